"""The boundaries between the rooms of the package, read off the sources."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "dpt_ray"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "jobs").rglob("*.py")])

# From the top floor down; a room imports from lower floors, and on its own floor one way at most.
FLOORS = (
    ("jobs",),
    ("cli",),
    ("commands",),
    ("pipeline",),
    ("stages",),
    ("learners", "report"),
    ("diffusion", "evaluation"),
    ("models", "cluster"),
    ("data", "training", "engine"),
    ("store", "config"),
)
LIGHT = ("cli", "commands", "pipeline", "stages", "engine", "store", "config")  # what a driver imports
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


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


def room(module):
    parts = module.split(".")
    return parts[1] if parts[0] == "dpt_ray" and len(parts) > 1 else parts[0]


def own_imports():
    """(importing module, imported module) of all that are in a room."""
    for name, path in MODULES.items():
        if name != "dpt_ray":
            yield from ((name, source) for source in own_modules(path))


def relative(path):
    return str(path.relative_to(ROOT))


def test_every_module_is_in_a_room_of_the_layout():
    assert {"dpt_ray.cli", "dpt_ray.pipeline.flow", "dpt_ray.models.uvit"} <= MODULES.keys()
    assert {"dpt_ray.store.artifact", "dpt_ray.config"} <= set(own_modules(MODULES["dpt_ray.engine.execute"]))
    assert {room(name) for name in MODULES if name != "dpt_ray"} == FLOOR.keys()


def test_only_the_cluster_imports_ray():
    users = {path for path in SOURCES if any(name.split(".")[0] == "ray" for name in imports(path))}
    assert any(path.parent == PACKAGE / "cluster" for path in users), "the walk finds no import of ray"
    assert {relative(path) for path in users if path.parent != PACKAGE / "cluster"} == set()


def test_imports_point_down():
    upwards = {
        f"{name} imports {source}"
        for name, source in own_imports()
        if FLOOR[room(source)] < FLOOR[room(name)]
    }
    assert upwards == set()


def test_rooms_of_one_floor_import_one_way():
    rooms = {name: set() for name in FLOOR}
    for name, source in own_imports():
        if room(name) != room(source) and FLOOR[room(name)] == FLOOR[room(source)]:
            rooms[room(name)].add(room(source))
    TopologicalSorter(rooms).prepare()  # raises CycleError, naming the rooms


def test_no_imports_go_round():
    order = TopologicalSorter({name: set(own_modules(path)) - {name} for name, path in MODULES.items()})
    order.prepare()  # raises CycleError, naming the cycle


def test_no_stage_imports_a_stage():
    between = {
        f"{name} imports {source}"
        for name, source in own_imports()
        if room(name) == room(source) == "stages" and name != source
    }
    assert between == set()


def reads_settings(node):
    """Whether an expression takes what the engine keeps for itself out of a manifest."""
    kept = ("settings", "unhashed")
    if isinstance(node, ast.Subscript):
        key = node.slice
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
        key = node.args[0] if node.args else None
    elif isinstance(node, ast.Attribute):
        return node.attr in kept and dotted(node.value).split(".")[-1] == "manifest"
    else:
        return False
    return isinstance(key, ast.Constant) and key.value in kept


def test_only_the_engine_reads_the_settings_of_a_manifest():
    readers = {path for path in PACKAGE.rglob("*.py") if any(map(reads_settings, ast.walk(tree(path))))}
    assert {relative(path) for path in readers if path.parent != PACKAGE / "engine"} == set()


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
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert {relative(path) for path in files if len(path.read_text().splitlines()) > 400} == set()


def fresh(code):
    """What a new interpreter prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_everything_but_the_cluster_is_imported_without_ray():
    names = [name for name in MODULES if name.startswith("dpt_ray.") and room(name) != "cluster"]
    fresh(
        "import importlib, sys\n"
        "sys.modules['ray'] = None\n"  # importing ray now raises ImportError
        f"for name in {names}: importlib.import_module(name)"
    )


def test_the_driver_starts_without_torch_and_without_ray():
    names = [name for name in MODULES if room(name) in LIGHT]
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
