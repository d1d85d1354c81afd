"""What is built from the checkout must be whole and nothing else."""

import re
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

from helpers.installed import CHECKOUT, HYPERPARAMS, Environment, build_wheel, call, output_of


def version_in_pyproject() -> str:
    return re.search(r'^version = "(.+)"$', (CHECKOUT / "pyproject.toml").read_text(), re.MULTILINE)[1]


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


def test_the_wheel_holds_the_package_and_the_hook_and_nothing_else(wheel: Path):
    package = {path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "sb3_vpg").rglob("*.py")}
    package = package - {"sb3_vpg/zoo/start_up_hook.py"} | {"sb3_vpg/py.typed", "sb3_vpg/study/report.html"}
    hyperparams = {f"sb3_vpg/{name}.yml" for name in HYPERPARAMS}
    assert "sb3_vpg/hyperparams/vpg.yml" in hyperparams
    # At the top level, and only there
    hook = {"sb3_vpg_zoo_hook.py", "sb3_vpg_zoo_hook.pth"}
    info = f"sb3_vpg-{version_in_pyproject()}.dist-info"
    metadata = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
    assert names_in(wheel) == sorted(package | hyperparams | hook | metadata)


def test_the_hook_in_the_wheel_is_one_line_that_imports_it(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("sb3_vpg_zoo_hook.pth") == b"import sb3_vpg_zoo_hook\n"
        assert archive.read("sb3_vpg_zoo_hook.py") == (CHECKOUT / "sb3_vpg" / "zoo" / "start_up_hook.py").read_bytes()


def test_a_wheel_built_from_the_source_distribution_is_the_same(wheel: Path, tmp_path: Path):
    build = (sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path)
    output_of(call(*build, CHECKOUT, cwd=tmp_path))
    name = f"sb3_vpg-{version_in_pyproject()}"
    with tarfile.open(tmp_path / f"{name}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    files = {path.relative_to(tmp_path / name).as_posix() for path in (tmp_path / name).rglob("*")}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "tests/integration/test_packaging.py"} <= files
    assert "rl-trained-agents/vpg/CartPole-v1_1/CartPole-v1.zip" in files
    again = build_wheel(tmp_path / name, tmp_path)
    assert names_in(again) == names_in(wheel)
    with zipfile.ZipFile(again) as one, zipfile.ZipFile(wheel) as other:
        for file in names_in(wheel):
            assert one.read(file) == other.read(file), file


def metadata_of(wheel: Path) -> Message:
    (metadata,) = (name for name in names_in(wheel) if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(metadata).decode())


def test_the_description_on_a_package_index_needs_no_checkout(wheel: Path):
    metadata = metadata_of(wheel)
    assert metadata["Description-Content-Type"].startswith("text/markdown")
    text = metadata.get_payload()
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)
    assert 'pip install "sb3_vpg[zoo]"' in text
    assert '".[' not in text
    sections = re.findall("^## (.*)", text, re.MULTILINE)
    assert sections == ["Train", "Why", "Formulations", "Can I use?", "Results", "Documentation", "Citation"]


def test_the_version_is_said_once(wheel: Path, installed: Environment):
    version = version_in_pyproject()
    assert metadata_of(wheel)["Version"] == version
    assert output_of(installed.run_warm("-c", "import sb3_vpg; print(sb3_vpg.__version__)")).strip() == version
    changelog = (CHECKOUT / "CHANGELOG.md").read_text()
    assert ("## Unreleased" if ".dev" in version else f"## {version}") in changelog
