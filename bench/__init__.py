"""Measure a bundle on the board that it was made for: latency, memory, ACC, ASR and RA (no torch, no onnx).

- `session`: runs everything and returns what result.json holds
- `options`: what to measure, and for how long
- `runner`: a runtime behind three verbs: activate, infer, release
- `external`: refuses ONNX files that point at other files
- `latency`: closed loop, warm-up until stationary, bundles interleaved
- `quantiles`: percentiles with distribution-free intervals
- `memory`: one child process a model
- `device`: what this machine is and how busy it is
- `validity`: when the figures say nothing, and why
- `result`: result.json: write, read, verify
- `table`: the comparison on a terminal
"""
