"""Power, clocks, heat and other programs' load, read while a model is timed (no torch, nothing is changed).

- `reading`: what one look at a machine gives
- `tegrastats`: lines of NVIDIA's tool, Xavier to Thor
- `sysfs`: INA rails, hwmon, RAPL, batteries, clocks, thermal zones, throttling
- `load`: what other programs take of the CPU
- `sampler`: the process that looks, ten times a second
- `monitor`: starts and stops it
- `trace`: what it saw, in the time of each model
- `clocks`: fixes clocks for as long as a measurement lasts, where asked to
"""
