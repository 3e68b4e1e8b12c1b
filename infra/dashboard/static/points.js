// Points drawn by WebGL, from columns of numbers as the server sends them.
//
// Written out, since regl and what builds on it compile code from strings, which the policy of these pages forbids.

const COLORS = 13;
const VERTEX = `
attribute float x, y, code, chosen;
uniform vec4 box;
uniform mediump float size;
uniform float some, turn;
uniform vec3 palette[${COLORS}];
uniform float opacity;
varying vec4 color;
void main() {
  bool here = turn == chosen;
  gl_Position = here ? vec4((x - box.x) / (box.z - box.x) * 2.0 - 1.0, (y - box.y) / (box.w - box.y) * 2.0 - 1.0, 0.0, 1.0) : vec4(2.0, 2.0, 2.0, 1.0);
  bool faded = some == 1.0 && chosen == 0.0;
  gl_PointSize = size;
  color = vec4(palette[int(code + 0.5)], faded ? opacity * 0.12 : opacity);
}`;
const FRAGMENT = `
precision mediump float;
varying vec4 color;
uniform mediump float size;
void main() {
  float far = length(gl_PointCoord - 0.5) * 2.0;
  float edge = size > 3.0 ? 1.0 - smoothstep(0.8, 1.0, far) : 1.0;
  gl_FragColor = vec4(color.rgb * color.a * edge, color.a * edge);
}`;

function shader(gl, kind, text) {
  const made = gl.createShader(kind);
  gl.shaderSource(made, text);
  gl.compileShader(made);
  if (!gl.getShaderParameter(made, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(made));
  return made;
}

/** What draws points on a canvas, or null where there is no WebGL. `lost` is called when the browser takes it away. */
export function pointsOn(canvas, lost) {
  const gl = canvas.getContext("webgl", { alpha: true, antialias: false, premultipliedAlpha: true });
  if (!gl) return null;
  const program = gl.createProgram();
  gl.attachShader(program, shader(gl, gl.VERTEX_SHADER, VERTEX));
  gl.attachShader(program, shader(gl, gl.FRAGMENT_SHADER, FRAGMENT));
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
  gl.useProgram(program);
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  canvas.addEventListener("webglcontextlost", (event) => { event.preventDefault(); lost(); });
  const buffers = {}, place = (name) => gl.getUniformLocation(program, name);
  const uniforms = Object.fromEntries(["box", "size", "some", "turn", "opacity", "palette"].map((name) => [name, place(name)]));
  let count = 0, box = [-1, -1, 1, 1], some = false, asked = 0;

  function column(name, values, kind) {
    buffers[name] ??= gl.createBuffer();
    gl.bindBuffer(gl.ARRAY_BUFFER, buffers[name]);
    gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
    const at = gl.getAttribLocation(program, name);
    gl.enableVertexAttribArray(at);
    gl.vertexAttribPointer(at, 1, kind, false, 0, 0);
  }

  function paint() {
    asked = 0;
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.uniform4fv(uniforms.box, box);
    gl.uniform1f(uniforms.some, some ? 1 : 0);
    // Points grow as the map is looked at from near, and are never too small to be seen.
    const ratio = window.devicePixelRatio || 1;
    gl.uniform1f(uniforms.size, ratio * Math.max(1.5, Math.min(9, (900 / Math.sqrt(count)) * Math.sqrt(3 / (box[2] - box[0])))));
    gl.uniform1f(uniforms.opacity, count > 100_000 ? 0.5 : 0.85);
    for (const turn of some ? [0, 1] : [0]) {
      gl.uniform1f(uniforms.turn, turn);
      gl.drawArrays(gl.POINTS, 0, count);
    }
  }

  const draw = () => { asked ||= requestAnimationFrame(paint); };
  return {
    /** Float32Array each. */
    places(x, y) {
      count = x.length;
      column("x", x, gl.FLOAT);
      column("y", y, gl.FLOAT);
      column("chosen", new Uint8Array(count), gl.UNSIGNED_BYTE);
    },
    /** Uint8Array: numbers of colors. */
    codes(values) { column("code", values, gl.UNSIGNED_BYTE); draw(); },
    /** Uint8Array of 0 and 1, or null for no selection: all others fade. */
    chosen(values) {
      some = values !== null;
      column("chosen", values ?? new Uint8Array(count), gl.UNSIGNED_BYTE);
      draw();
    },
    /** [r, g, b] from 0 to 255 each. */
    palette(colors) { gl.uniform3fv(uniforms.palette, new Float32Array(colors.flat().map((value) => value / 255))); draw(); },
    look(part) { box = part; draw(); },
    size(width, height) {
      const ratio = window.devicePixelRatio || 1;
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      draw();
    },
    /** After all that was asked for is drawn. */
    drawn() { return new Promise((done) => { requestAnimationFrame(() => { gl.finish(); done(); }); }); },
  };
}
