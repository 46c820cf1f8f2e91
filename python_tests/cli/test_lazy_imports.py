"""What is imported when: by counting modules, as seconds depend on the machine."""

import json
import subprocess
import sys

import locas_ext

HEAVY = {"torch", "transformers", "numpy", "matplotlib", "safetensors", "yaml", "huggingface_hub", "peft"}
MOST_MODULES = 700  # `locas memorize --help` takes about 550, torch alone 1,500 more


def modules_after(code: str) -> set[str]:
    script = f"import contextlib, io, json, sys\nwith contextlib.redirect_stdout(io.StringIO()):\n    {code}\n"
    script += "print(json.dumps(list(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))


def test_help_imports_no_heavy_library():
    commands = "demo memorize perplexity generate chat locomo recall study merge capability report info".split()
    calls = [["--help"], ["--version"], *([name, "--help"] for name in commands)]
    imported = modules_after(f"from locas_ext.cli import main; assert not any([main(call) for call in {calls}])")
    assert not imported & HEAVY and len(imported) < MOST_MODULES


def test_a_wrong_argument_imports_no_heavy_library():
    imported = modules_after("from locas_ext.cli import main; assert main(['memorize', 'a', '--rank', 'x']) == 2")
    assert not imported & HEAVY


def test_the_package_alone_imports_nothing():
    imported = modules_after("import locas_ext; locas_ext.__version__, dir(locas_ext)")
    assert {name for name in imported if name.startswith("locas_ext")} == {"locas_ext", "locas_ext.version"}
    assert not imported & HEAVY


def test_settings_and_errors_do_without_torch():
    assert not modules_after("from locas_ext import LocasConfig, LocasError; LocasConfig(rank=3)") & HEAVY


def test_every_public_name_is_there():
    names = {}
    exec("from locas_ext import *", names)
    assert set(locas_ext.__all__) <= set(names) and set(locas_ext.__all__) <= set(dir(locas_ext))
    # every lazy name is public, and the other way round
    assert {*locas_ext._MODULE_OF, *locas_ext._MODULES, "__version__"} == set(locas_ext.__all__)
    assert locas_ext.ops.glu_ffn and locas_ext.reference.glu_ffn
    assert not hasattr(locas_ext, "no_such_name")
