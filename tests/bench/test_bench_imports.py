from __future__ import annotations

import subprocess
import sys

CODE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {'torch', 'torchvision', 'onnx', 'onnxruntime', 'tensorrt', 'PIL', 'scipy'}:
            raise ModuleNotFoundError(f'{name} is blocked', name=name)

sys.meta_path.insert(0, Blocker())
import importlib, pkgutil
import rkd.bench
names = [m.name[10:] for m in pkgutil.walk_packages(rkd.bench.__path__, 'rkd.bench.')]
for name in names:
    importlib.import_module(f'rkd.bench.{name}')
print(' '.join(names))
"""


def test_every_module_imports_on_a_board_without_torch_onnx_or_any_runtime():
    done = subprocess.run([sys.executable, "-W", "error", "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {
        "session",
        "runner",
        "latency",
        "memory",
        "memory_child",
        "device",
        "result",
        "table",
        "sensors.sampler",
    } <= set(done.stdout.split())
