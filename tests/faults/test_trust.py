"""Nothing in the sources can run what a file says: no pickle, no eval, no unsafe loader, no shell."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("fedlora", "strategies", "clients", "scenarios", "benchmarks", "examples")
MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "pandas.read_pickle"}
SAFE = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
JUSTIFIED: dict[str, str] = {}  # "file:call": why it may stand

# Ray hands calls and results between a run's own processes with pickle: they are of one user and one machine or
# cluster, and nothing that a client or a file holds is unpickled.


def found(tree):
    """The calls and imports of a module that could run what data says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield node.module
        elif isinstance(node, ast.Call):
            name, words = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in BUILTINS | CALLS or words.get("shell") == "True":
                yield name
            if name in SAFE and words.get(SAFE[name][0]) != str(SAFE[name][1]):
                yield name


def test_no_source_runs_what_data_says():
    files = [f for folder in FOLDERS for f in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 60
    told = {f"{f.relative_to(ROOT)}:{what}" for f in files for what in found(ast.parse(f.read_text()))}
    assert told == set(JUSTIFIED)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import loads",
        "eval(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(line):
    assert list(found(ast.parse(line)))


@pytest.mark.parametrize(
    "line", ["model.eval()", "torch.load(p, weights_only=True)", "np.load(p, allow_pickle=False)"]
)
def test_the_search_lets_the_safe_ones_pass(line):
    assert not list(found(ast.parse(line)))
