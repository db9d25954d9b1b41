"""The house plan, held: imports point one way, and importing the package is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    "errors",
    "folders",
    "rng",
    "types",
    "config",
    "sampling",
    "simulator",
    "truth",
    "synthetic",
    "text",
    "movielens",
    "envs",
    "domain",
    "columns",
    "manifest",
    "storage",
    "interchange",
    "streaming",
    "recording",
    "wrappers",
    "collecting",
]


def imports_of(path: Path) -> set[str]:
    """Modules that `path` imports when it is imported itself (not inside functions or for type checking only)."""
    found: set[str] = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
            elif isinstance(node, ast.ClassDef | ast.Try) or (
                isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test)
            ):
                visit(node.body)

    visit(ast.parse(path.read_text(encoding="utf-8")).body)
    return found


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize(
    ("package", "forbidden"), [("offprompts_env", ("agents", "benchmarks")), ("agents", ("benchmarks",))]
)
def test_packages_point_one_way(package: str, forbidden: tuple[str, ...]) -> None:
    files = modules(package)
    assert files
    for path in files:
        source = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(source):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                assert name.split(".")[0] not in forbidden, f"{path.name} imports {name}"


def test_layers_of_the_environment_package_point_down() -> None:
    for level, layer in enumerate(LAYERS):
        room = ROOT / "offprompts_env" / layer
        for path in modules(f"offprompts_env/{layer}") if room.is_dir() else [room.with_suffix(".py")]:
            for name in imports_of(path):
                parts = name.split(".")
                if parts[0] == "offprompts_env" and len(parts) > 1 and parts[1] in LAYERS:
                    assert LAYERS.index(parts[1]) <= level, f"{path.name} ({layer}) imports {name}"


def test_learners_never_name_the_oracle() -> None:
    for path in modules("agents"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert not names & {"oracle_field", "expected_reward"}, path.name


def test_import_is_light() -> None:
    heavy = ("torch", "transformers", "stable_baselines3", "pandas", "pyarrow", "sklearn", "matplotlib")
    code = (
        "import sys, offprompts_env, gymnasium; gymnasium.make('OffPrompts-Synthetic-v0').reset(seed=0); "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
