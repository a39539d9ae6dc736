"""The format is known to transformers without `import oats`, whatever is imported first."""

import os
import subprocess
import sys
import time

import pytest

from oats import _autoload

IMPORTS = {
    "torch, then transformers": "import torch; from transformers import LlamaForCausalLM",
    "transformers alone": "import transformers; transformers.LlamaForCausalLM",
    "an auto class": "from transformers import AutoModelForCausalLM, LlamaForCausalLM",
    # Here torch is imported while quantizers.auto is half executed.
    "quantizers.auto": "import transformers.quantizers.auto, transformers.modeling_utils",
    "modeling_utils": "import transformers.modeling_utils",
    "oats, then transformers": "import oats; from transformers import LlamaForCausalLM",
    "registered again": (
        "import torch; from oats._autoload import register; register()\n"
        "import oats.integrations.transformers; register()\n"
        "from transformers import LlamaForCausalLM; register()"
    ),
}

CHECK = """
import sys
auto = sys.modules["transformers.quantizers.auto"]
print("oats" in auto.AUTO_QUANTIZER_MAPPING and "oats" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def run(code: str, **environment: str) -> str:
    result = python(code, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("imports", IMPORTS.values(), ids=IMPORTS.keys())
def test_registered_in_a_fresh_process(imports: str) -> None:
    assert run(imports + CHECK) == "True\n"


def test_explicit_import_where_entry_points_are_off() -> None:
    imports = (
        "from transformers import LlamaForCausalLM" + CHECK + "import oats.integrations.transformers" + CHECK
    )
    assert run(imports, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "False\nTrue\n"


def test_import_torch_imports_nothing_else() -> None:
    code = """
import sys, torch
print([name for name in sys.modules if name.split(".")[0] in ("transformers", "wrapt")])
print([name for name in sys.modules if name.startswith("oats.")])
import importlib.machinery, inspect, transformers.modeling_utils as m
print(type(m.__loader__) is importlib.machinery.SourceFileLoader, len(inspect.getsource(m)) > 0)
"""
    assert run(code) == "[]\n['oats._autoload']\nTrue True\n"


def test_a_broken_integration_breaks_neither_torch_nor_transformers() -> None:
    code = """
import sys
sys.modules["oats.integrations.transformers"] = None  # importing it raises
import torch, transformers.modeling_utils
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert "will not load OATS checkpoints in this process" in result.stderr


def test_register_is_cheap_and_repeatable() -> None:
    _autoload.register()
    finders = list(sys.meta_path)
    start = time.perf_counter()
    for _ in range(100):
        _autoload.register()
    assert (time.perf_counter() - start) / 100 < 1e-3
    assert sys.meta_path == finders
