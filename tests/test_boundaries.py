"""The boundaries of ARCHITECTURE.md, read off the sources."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "dpt_ray"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "jobs").rglob("*.py")])

# From the ground up; a module imports from its own layer or from lower ones.
LAYERS = [
    {"yaml_file", "sections", "config", "artifacts", "cache", "lease"},
    {"data", "diffusion", "models"},
    {"learners", "training", "evaluation", "report"},
    {"stages"},
    {"cli", "interrupt"},
    {"jobs"},
]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path):
    """Every name that a file imports, in functions too: "a.b" for `import a.b` and `from a import b`."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_modules(path):
    """The modules of this project that a file imports."""
    for name in imports(path):
        for candidate in (name, name.rpartition(".")[0]):
            if candidate in MODULES and candidate != "dpt_ray":
                yield candidate
                break


def layer(module):
    parts = module.split(".")
    part = parts[1] if parts[0] == "dpt_ray" else parts[0]
    return next(height for height, names in enumerate(LAYERS) if part in names)


def relative(path):
    return str(path.relative_to(ROOT))


def test_there_is_something_to_check():
    assert {"dpt_ray.cli", "dpt_ray.pipeline.flow", "dpt_ray.models.uvit"} <= MODULES.keys()
    assert {"dpt_ray.store.artifact", "dpt_ray.config"} <= set(own_modules(MODULES["dpt_ray.engine.execute"]))


def test_only_the_stages_import_ray():
    users = {path for path in SOURCES if any(name.split(".")[0] == "ray" for name in imports(path))}
    assert users, "nothing imports ray: the walk is broken"
    assert [relative(path) for path in sorted(users) if path.parent != PACKAGE / "stages"] == []


def test_imports_point_one_way():
    wrong = [
        f"{name} imports {source}"
        for name, path in MODULES.items()
        if name != "dpt_ray"
        for source in own_modules(path)
        if layer(source) > layer(name)
    ]
    assert wrong == []


def test_training_knows_no_learner():
    training = [path for name, path in MODULES.items() if name.startswith("dpt_ray.training")]
    assert not [source for path in training for source in own_modules(path) if "learners" in source]


def test_no_imports_go_round():
    order = TopologicalSorter({name: set(own_modules(path)) - {name} for name, path in MODULES.items()})
    order.prepare()  # raises CycleError, naming the cycle


def dotted(node):
    """ "a.b.c" of a called expression."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            options = {option.arg: getattr(option.value, "value", None) for option in node.keywords}
            yield dotted(node.func), options, f"{relative(path)}:{node.lineno}"


def test_nothing_is_pickled_and_no_pickle_is_run():
    modules = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    found = []
    for path in SOURCES:
        for name, options, where in calls(path):
            of_pickle = name.split(".")[0] in modules or name.endswith("cloudpickle.dumps")
            of_torch = name == "torch.load" and options.get("weights_only") is not True
            of_numpy = name in {"np.load", "numpy.load"} and options.get("allow_pickle", False)
            if of_pickle or of_torch or of_numpy:
                found.append(f"{where} {name}")
        # weights.py needs the name of an error; nothing else of pickle is wanted anywhere.
        others = [name for name in imports(path) if name.split(".")[0] in modules and name != "pickle"]
        found += [f"{relative(path)} imports {name}" for name in others]
    assert found == []


def test_nothing_prints_or_runs_a_shell():
    bad = {"print", "os.system", "eval", "exec"}
    found = [
        f"{where} {name}" for path in PACKAGE.rglob("*.py") for name, _, where in calls(path) if name in bad
    ]
    assert found == []


def test_files_stay_short():
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {path: length for path, length in lengths.items() if length > 400} == {}


def fresh(code):
    """What a new interpreter prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_everything_but_the_stages_works_without_ray():
    names = [name for name in MODULES if name.startswith("dpt_ray.") and layer(name) < 3]
    assert len(names) > 30
    fresh(
        "import importlib, sys\n"
        "sys.modules['ray'] = None\n"  # importing ray now raises ImportError
        f"for name in {names}: importlib.import_module(name)"
    )


def test_the_driver_starts_without_torch_and_without_ray():
    names = [name for name in MODULES if name.startswith("dpt_ray.stages")] + ["dpt_ray.cli"]
    loaded = fresh(
        "import importlib, sys\n"
        "seen = set()\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'ray', 'timm', 'diffusers'} & sys.modules.keys() - seen\n"
        "    seen |= heavy\n"
        "    print(*[f'{name}:{module}' for module in heavy])"
    )
    assert loaded == []
