"""The wheel as a user installs it: its command, its plug-ins, and the core without what trains."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = ("train", "teach", "export", "import-llava", "evaluate", "compare", "profile", "calibrate")
COMMANDS += ("generate", "validate")
TRAINS = ("peft", "hydra", "omegaconf", "datasets", "accelerate", "deepspeed", "pytorch_lightning", "scipy")
CORE = """
import sys
for name in {hidden}: sys.modules[name] = None  # an import of it fails
import torch, latefusion as lf
from latefusion.models.base_model import load_base
from latefusion.models.policies import named
model, processor = load_base("embedded", dtype=torch.float32)
ids = torch.tensor([[1, 3, 3, 3, 3, 9, 10, 11]])
from latefusion.models.student.whole import record
with lf.attach(model, named("fastv")): pass
with lf.attach(model, lf.VisionSchedule(enter=2, exit=9)):
    model(input_ids=torch.tensor([[1, *[3] * 144, 9, 10]]), pixel_values=torch.zeros(1, 3, 96, 96))
record(model, lf.VisionSchedule(enter=2, exit=9))
model.save_pretrained(sys.argv[1]); processor.save_pretrained(sys.argv[1])
print(lf.attached(lf.load(sys.argv[1])[0]).policy.to_dict())
try: lf.load(sys.argv[2])
except ValueError as error: print(error)
"""


def ran(*words, **settings):
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, **settings)
    return done.returncode, done.stdout + done.stderr


def test_the_core_needs_nothing_that_trains(tmp_path):
    """`pip install latefusion` alone: prune, load a merged student; adapters say what they need."""
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    code, output = ran(
        sys.executable, "-c", CORE.format(hidden=TRAINS), tmp_path / "whole", tmp_path / "adapters"
    )
    assert not code, output
    assert "{'enter': 2, 'exit': 9, 'keep': {}}" in output
    assert "holds adapters, and peft is not installed: pip install 'latefusion[train]'" in output


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The bin folder of a new environment with the built wheel, beside the packages of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip")
    if ran(*pip, "--version")[0]:  # an environment without pip
        pip = (str(Path(sys.base_prefix) / "bin" / "python3"), "-m", "pip")
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    source = folder / "source"
    names = ran("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT)[1].splitlines()
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    code, output = ran(sys.executable, "-c", build, folder, cwd=source)
    assert not code, output[-2000:]
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site = Path(ran(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")[1].strip())
    code, output = ran(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    assert not code, output[-2000:]
    here = [path for path in sys.path if path.endswith("site-packages")] or [sysconfig.get_path("purelib")]
    (site / "zz_packages.pth").write_text("\n".join(here) + "\n")
    return folder / "venv" / "bin"


@pytest.mark.slow
def test_the_installed_command_explains_itself(installed, tmp_path):
    """Nobody needs a checkout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"cwd": tmp_path, "env": environment}
    where = "import latefusion; print(latefusion.__file__)"
    assert str(installed.parent) in ran(installed / "python", "-c", where, **options)[1]
    code, output = ran(installed / "latefusion", "--help", **options)
    assert not code and all(f"\n  {name} " in output for name in COMMANDS), output
    for name in COMMANDS:
        code, output = ran(installed / "latefusion", name, "--help", **options)
        assert not code and "Traceback" not in output, (name, output)
    code, output = ran(installed / "latefusion", "train", "recip=dense", **options)
    assert code and "recip does not exist (did you mean recipe?)" in output
    code, output = ran(installed / "latefusion", "trian", **options)
    assert code and "latefusion has no command trian; choose one of train, teach" in output


@pytest.mark.slow
def test_the_installed_package_trains_under_accelerate_without_a_checkout(installed, tmp_path):
    """`accelerate launch -m latefusion.training.train` reads the recipes in the wheel."""
    words = ("-m", "accelerate.commands.launch", "--cpu", "-m", "latefusion.training.train", "--cfg", "job")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    code, output = ran(installed / "python", *words, "recipe=cross_only", cwd=tmp_path, env=environment)
    assert not code and "name: cross_only" in output


@pytest.mark.slow
def test_the_wheel_has_the_plug_ins(installed):
    code = (
        "import json; from importlib.metadata import distribution as d;"
        "print(json.dumps({e.group: e.value for e in d('latefusion').entry_points}))"
    )
    points = json.loads(ran(installed / "python", "-c", code)[1])
    assert points["vllm.general_plugins"] == "latefusion.serving.plugin:register"
    assert points["console_scripts"] == "latefusion.__main__:main"
    assert "lmms_eval.models" in points
