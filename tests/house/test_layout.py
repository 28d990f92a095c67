"""Who may import whom, what an import may cost, and what every module must have."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for part in ("kimi_lite", "quantize", "runtime")
    for path in sorted((ROOT / part).rglob("*.py"))
    if "__pycache__" not in path.parts
]
MODULES = {
    path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES
}


def kimi_name(module: str) -> str:
    return module if module.startswith("kimi_lite") else f"kimi_lite.{module}"


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


# importer's prefix: prefixes that it must not import
FORBIDDEN = {
    "kimi_lite.formats": (
        "kimi_lite.quantize",
        "kimi_lite.runtime",
        "kimi_lite.api",
        "kimi_lite.cli",
        "kimi_lite.chat",
    ),
    "kimi_lite.quantize": ("kimi_lite.runtime", "kimi_lite.api", "kimi_lite.cli", "kimi_lite.chat"),
    "kimi_lite.runtime": ("kimi_lite.quantize", "kimi_lite.api", "kimi_lite.cli", "kimi_lite.chat"),
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_dependence_goes_one_way(path: Path) -> None:
    module = kimi_name(MODULES[path])
    for prefix, banned in FORBIDDEN.items():
        if module.startswith(prefix):
            wrong = {name for name in imported(path) if name.startswith(banned)}
            assert not wrong, f"{module} imports {sorted(wrong)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_torch_is_imported_by_the_reference_and_by_one_module_that_nothing_imports_by_name(
    path: Path,
) -> None:
    banned = {"torch", "transformers", "bitsandbytes"}
    if "reference" in path.parts:
        return
    if path == ROOT / "runtime" / "bnb.py" or path == ROOT / "kimi_lite" / "runtime" / "bnb.py":
        banned = {"transformers"}
    assert not {
        n for n in imported(path) if n.split(".")[0] in banned or n.startswith("kimi_lite.runtime.bnb")
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_has_a_head_and_at_most_600_lines(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert len(text.splitlines()) <= 600


@pytest.mark.parametrize(
    "command", ["import kimi_lite", "from kimi_lite.__main__ import main; main(['--help'])"]
)
def test_a_light_start_imports_nothing_heavy(command: str) -> None:
    heavy = "{'torch', 'numpy', 'PIL', 'av', 'pypdfium2'}"
    code = f"import sys\ntry:\n    {command}\nexcept SystemExit:\n    pass\nassert not {heavy} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_question_without_a_picture_waits_for_no_package_that_it_does_not_need() -> None:
    slow = "{'torch', 'gguf', 'PIL', 'av', 'pypdfium2', 'safetensors', 'llama_cpp'}"
    question = "from kimi_lite.__main__ import main; main(['ask', '--vram', '0', 'What is 38 + 47?'])"
    code = f"import sys\ntry:\n    {question}\nexcept SystemExit as end:\n    assert not end.code\nassert not {slow} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["runtime", "quantize"])
def test_the_folders_refuse_to_be_imported_under_their_bare_names(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode != 0
    assert f"kimi_lite.{name}" in done.stderr
