"""The configuration with comments that `lodeset init` writes."""

TEMPLATE = """\
# lodeset: one file, one run. `lodeset plan` shows what it would do; only `pool` must be set.
# Relative paths start from this file. `lodeset schema` prints every key with its unit.

store: ./runs                     # any fsspec URL

pool:                             # the uncurated images: folders, archives (tar, zip), Parquet, lists of paths; globs allowed
  - uri: images/
  # - {uri: "shards/*.tar", members: {exclude: "*.seg.png"}}    # members to leave out; `exclude:` leaves out files and
  # folders

# What to look for. Without a curated set, every image that dedup keeps goes into the shards.
# curated:
#   - name: flowers
#     uri: flowers.tar
#     include: true               # its own images go in, too
#     retrieve: {mode: sample, k: 4}
#   - name: landmarks
#     uri: landmarks/
#     retrieve: {mode: cluster, per_cluster: 10000, min_matches: 4, limit: 1000000}

# selection: {shared: each}       # an image that several sets select: counts for `each` of them (stored once), or for
# the `best` match only

# Images whose near-duplicates must never reach training.
# reference:
#   - {name: flowers-test, uri: flowers-test/}

# Labeled sets to evaluate on: metadata fields `label`, and `split` (gallery and test, or train and validation); or
# folders, <split>/<class>/ or <class>/. targets:
#   - {name: flowers, uri: flowers.parquet, label: label, split: split}

embed:
    semantic: {kind: patch_dictionary}    # fitted on the pool, no download; much better are:
  # semantic: {kind: onnx, path: dinov2.onnx}
  # semantic: {kind: huggingface, model: facebook/dinov2-small}    # or a folder, e.g. what `training` exported
  # semantic: {kind: torchscript, path: model.pt, size: 224}
  # semantic: {kind: precomputed, path: vectors/*.parquet}

# A sample of the pool with equal shares of every cluster (Vo et al. 2024) instead of the whole pool. k: levels, lowest
# first. cluster: {k: [10000, 500]} balance: {images: 100000}

filter:                           # an image's reason is the first filter that it fails, in this order
  min_side: 16                    # pixels
    # max_aspect: 3                 # longer side over shorter
    # blank: true                   # luminance deviation of the thumbnail below 5
    # min_sharpness: 0.2            # 0..1; sharpness and classifiers read each image once, whatever the thresholds are
    # classifiers:                  # any ONNX network, with its own threshold
  #   - {name: nsfw, path: nsfw.onnx, index: 1, activation: softmax, keep: below, threshold: 0.5}
    # blocked_domains: [example.com]    # or a file with one per line; compared with `url` of the metadata
  # blocked_urls: [example.org/private/]
    # faces: {path: faces.onnx, threshold: 0.5}    # blurs faces; a blurred image is a new image
# by_hand: {drop: [lists/bad.txt], keep: [lists/wanted.txt]}    # images that you decided on: files with one image_id a line
dedup: {threshold: auto, reference_threshold: auto, verify: pixels}
shards: {size_mb: 256, seed: 0}

# DINOv2 on the shards; then sparsification of the trained model.
# training: {recipe: tiny, steps: 1000}
# pruning:
#   - {method: entropic, sweep: [1.0e-4, 1.0e-3, 1.0e-2]}

# What every finished run must fulfill; a breached gate ends `lodeset run` with exit status 3.
# gates:
#   - {name: enough, measure: kept, error: "< 0.9 of accepted"}    # of the run that `lodeset accept` marked
#   - {name: broken, measure: dropped_share, stage: ingest, reason: corrupt, warn: "> 1 %", error: "> 5 %"}

# When it runs by itself: `lodeset schedule --install`. `lodeset render` takes the rest of `deploy`.
# deploy: {schedule: {cron: "0 3 * * 1", timezone: Europe/Berlin}}
"""
