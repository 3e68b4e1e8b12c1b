export { checkSupport, createRegl, createRenderer, createSpatialIndex, default } from "regl-scatterplot";
