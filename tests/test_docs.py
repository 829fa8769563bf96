"""README and docs: their tables are the records', their commands run, their links lead somewhere."""

import importlib
import importlib.util
import re
import shlex
import shutil
import sys

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

import finetune
from benchmarks import docs
from finetune import run
from finetune.__main__ import VERBS
from finetune.__main__ import main as verb
from finetune.cli.parser import arguments
from finetune.models.backbone import meta_backbone
from finetune.training.setup import check_recipe
from helpers import ROOT, SmallNet, small_recipe

PAGES = docs.pages()
OPTIONS = (ROOT / "docs" / "recipes.md").read_text().partition("## Options")[2]
OPTIONS += (ROOT / "docs" / "augmentation.md").read_text()
IN_RECIPE = re.findall(r"^\| .+? \| `(.+?)` \| .+? \|$", OPTIONS, re.M)
OF_TIMM = {"groups": finetune.LayerDecay(head_lr=1e-3, stem_ratio=0.1), "backbone": "resnet18", "head": None}
TOOLS = ("finetune", "accelerate", "python", "pip")


def by_name(page):
    return str(page.relative_to(ROOT))


def command_lines(page):
    """The commands of a page's code blocks, each with the reason why it is not run, or none."""
    lines = [line.strip() for line in page.read_text().splitlines() if line.startswith("    ")]
    found = [line.partition("# not run") for line in lines if line.split()[:1] and line.split()[0] in TOOLS]
    return [(line.strip(), reason.removeprefix(":").strip() if marker else None) for line, marker, reason in found]


def parts(line):
    """The commands of a line as words, without its comment; what CI alone runs (ruff, pytest, ...) left out."""
    commands = [shlex.split(part, comments=True) for part in line.split(" && ")]
    return [words for words in commands if words[0] in TOOLS]


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_tables_are_those_of_the_records(page):
    """Writing a page's tables anew from the kept records changes nothing, and no comment hides a line of text."""
    text = page.read_text()
    assert docs.rewritten(text) == text, "python -m benchmarks.docs"
    assert all(line.endswith("-->") for line in text.splitlines() if line.strip().startswith("<!--"))  # else raw HTML


def test_a_stale_table_is_found():
    """A block with another number is written anew, and --check says so."""
    page = ROOT / "README.md"
    text = page.read_text()
    assert docs.rewritten(text.replace("3 seeds)", "4 seeds)")) == text


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_command_runs(page, tmp_path, monkeypatch, capsys, image_folder, request):
    """Each command of a page, in order and word for word but for its places, ends well, or says why it is not run."""
    commands = command_lines(page)
    if any(" RUN " in line for line, _ in commands):
        shutil.copytree(request.getfixturevalue("run_folder"), tmp_path / "RUN")
    if any(" last " in line for line, _ in commands):
        shutil.copytree(request.getfixturevalue("run_folder"), tmp_path / "runs" / "resnet18_cifar-1")
    shutil.copytree(image_folder / "train", tmp_path / "photos")
    shutil.copy(next(image_folder.rglob("*.png")), tmp_path / "photo.jpg")
    for folder, label in (("photographs", "red"), ("more", "blue")):
        shutil.copytree(image_folder / "val" / label, tmp_path / folder)
    for file in (tmp_path / "more").iterdir():
        file.rename(file.with_suffix(".jpg"))
    (tmp_path / "path" / "to").mkdir(parents=True)
    shutil.copy(ROOT / "recipes" / "resnet18_cifar.py", tmp_path / "path" / "to" / "my_recipe.py")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    shutil.copy(ROOT / "accelerate_config.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for line, why_not in commands:
        for words in parts(line):
            words = [str(image_folder) if (before, word) == ("--data", "DIR") else word for before, word in zip(
                ["", *words], words, strict=False)]  # fmt: skip
            if why_not is None:
                assert ended_well(words, monkeypatch), (words, capsys.readouterr().err)
            else:
                assert why_not and understood(words), words


def ended_well(words, monkeypatch):
    """Run a command; training is planned only, and what is installed is only looked up."""
    match words:
        case ["finetune", "train", *rest]:
            return verb(["train", *rest, *["--dry-run"] * ("--dry-run" not in rest)]) == 0
        case ["finetune", *rest]:
            return verb(rest) == 0
        case ["python", "-m", module, *rest] if module.startswith("benchmarks."):
            monkeypatch.setattr(sys, "argv", [module, *rest, *["--check"] * (module == "benchmarks.docs")])
            return importlib.import_module(module).main() == 0
        case ["accelerate", "launch", *rest]:
            launched = launch_command_parser().parse_args(rest)
            assert launched.training_script == "finetune/run.py"
            if "--resume" in launched.training_script_args:  # there is no run to resume here: tests/training/test_resume.py
                return run.arguments(launched.training_script_args)
            return run.main([*launched.training_script_args, "--dry-run"]) == 0
        case ["pip", "install", "-e", target]:
            project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
            return set(target.removeprefix(".[").removesuffix("]").split(",")) <= project["optional-dependencies"].keys()
    return False


def understood(words):
    """Whether a command that is not run is one that could be: its parser takes it, or its module is there."""
    match words:
        case ["finetune", *rest]:
            return arguments(rest, VERBS)
        case ["python", "-m", module, *_]:
            return importlib.util.find_spec(module)
    return False


def test_every_verb_is_shown(capsys):
    """The page of commands has every verb, and no other."""
    lines = [words for line, _ in command_lines(ROOT / "docs" / "cli.md") for words in parts(line)]
    with pytest.raises(SystemExit):
        verb(["--help"])
    assert {words[1] for words in lines if words[0] == "finetune"} == set(VERBS)
    assert set(re.findall(r"^    ([a-z-]+)(?: |$)", capsys.readouterr().out, re.M)) == set(VERBS)


@pytest.mark.parametrize("name", VERBS)
def test_help_has_an_example(capsys, name):
    """Every verb's --help ends in an example that its own parser takes."""
    with pytest.raises(SystemExit):
        verb([name, "--help"])
    example = re.search(r"example: finetune (.+)", " ".join(capsys.readouterr().out.split()))[1]
    assert arguments(shlex.split(example), VERBS).verb


def test_the_recorded_session_is_of_these_commands():
    """The commands of the recording in docs/terminal.md can be typed, and no line is wider than its terminal."""
    text = (ROOT / "docs" / "terminal.md").read_text()
    console = re.search(r"^```console\n(.+?)^```$", text, re.M | re.S)[1]
    typed = [line.removeprefix("$ finetune ") for line in console.splitlines() if line.startswith("$ finetune ")]
    assert [arguments(shlex.split(line), VERBS).verb for line in typed] == [
        VERBS[name] for name in ("train", "resume", "predict", "export", "runs")
    ]
    assert max(map(len, console.splitlines())) <= 80


@pytest.mark.parametrize("fields", IN_RECIPE)
def test_every_option_of_the_table_is_a_recipe(fields):
    """What the table of options shows can be written into a recipe, and fits a network."""
    changes = eval(f"dict({fields})", {**vars(finetune), "augment_image": lambda image, rng: image})
    of_timm = "LayerDecay" in fields or changes.keys() & {"dropout", "gradient_checkpointing"}
    made = small_recipe(**{**(OF_TIMM if of_timm else {}), **changes})
    check_recipe(made, meta_backbone(made))


def test_the_table_has_every_field():
    """Each field of a recipe that changes training has its row on one of two pages; the others are in the recipe shown."""
    shown = {name for fields in IN_RECIPE for name in re.findall(r"(\w+)=", fields)}
    fields = {name for kind in (finetune.Recipe, finetune.Group, finetune.Augment) for name in kind.__dataclass_fields__}
    network = {"backbone", "weights", "head", "seed", "epochs", "name", "pattern"}
    assert fields - shown == network
    kinds = [kind for kind in finetune.Schedule.__subclasses__() if kind.__name__ in finetune.__all__]  # not those of tests
    assert len(kinds) > 5 and all(f"`{kind.__name__}`" in OPTIONS for kind in kinds)


def blocks(page, holding="recipe = Recipe("):
    """A page's blocks of Python with those words; the recipes that it shows as whole files."""
    return [block for block in re.findall(r"^```python\n(.+?)^```$", page.read_text(), re.M | re.S) if holding in block]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=by_name)
def test_a_recipe_that_is_shown_is_valid(page):
    """A recipe on a page is a whole file, and fits its network."""
    for block in blocks(page):
        scope = {}
        exec(block, scope)
        check_recipe(scope["recipe"], meta_backbone(scope["recipe"]))


def test_the_custom_loop_runs():
    """The loop on the page of custom loops trains for as long as the recipe says."""
    (block,), net, steps = blocks(ROOT / "docs" / "custom_loops.md", "make_optimizer"), SmallNet(), []
    exec(block, {"recipe": small_recipe(), "net": net, "loader": Steps(steps)})
    assert len(steps) == small_recipe().epochs


class Steps(list):
    """A loader of one batch, which counts its passes in a list."""

    def __init__(self, passes):
        super().__init__([(None, None)])
        self.passes = passes

    def __iter__(self):
        self.passes.append(1)
        return super().__iter__()


def anchors(page):
    """The names by which a page's headings are linked to."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_link_leads_somewhere(page):
    """The files and headings that a page links to are there, and so are its pictures."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.is_file() and (not anchor or anchor in anchors(file)), target


def test_the_readme_is_short():
    """At most 130 lines, and fewer than 1,200 words."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130 and len(text.split()) < 1200


def test_the_site_has_every_page():
    """The site's navigation lists each page of docs/ once."""
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)["nav"]
    assert sorted(nav) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
