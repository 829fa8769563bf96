"""Every verb that writes finds out first whether it can."""

import pytest

from finetune import __main__ as command_line
from finetune.tools import image_stats, lr_finder
from finetune.utils.errors import RecipeError
from finetune.utils.files import check_folder

WRITES = {
    "train": ["train", "efficientnet_lite0_digits", "--processes", "1", "--output"],
    "plan": ["plan", "efficientnet_lite0_digits", "--output"],
    "find-lr": ["find-lr", "efficientnet_lite0_digits", "--output"],
    "reproduce": ["reproduce", "efficientnet_lite0_digits", "--output"],
    "evaluate": ["evaluate", "RUN", "--data", "digits", "--output"],
    "export": ["export", "RUN", "--to", "torch", "--output"],
    "suggest": ["suggest", "--data", "IMAGES", "--output"],
    "cp": ["cp", "efficientnet_lite0_digits"],
}


@pytest.mark.parametrize("verb", WRITES)
def test_a_place_that_can_not_be_written_to_is_found_before_the_work(run_folder, image_folder, here, capsys, monkeypatch, verb):
    """Under a file, and where a name is too long: one sentence and exit code 2, and neither weights nor images are read."""

    def never(*args, **options):
        raise AssertionError("work was begun")

    for module, name in ((lr_finder, "range_test"), (image_stats, "compute_image_stats")):
        monkeypatch.setattr(module, name, never)
    monkeypatch.setattr("finetune.data.sources.load_data", never)
    (here / "afile").write_text("x")
    words = [{"RUN": str(run_folder), "IMAGES": str(image_folder)}.get(word, word) for word in WRITES[verb]]
    for place in ("afile/x", "afile/x/y", f"{'n' * 300}/x"):
        target = f"{place}.py" if verb in ("suggest", "cp") else place
        assert command_line.main([*words, target]) == 2
        text = capsys.readouterr().err.strip().splitlines()
        assert text[-1].startswith("finetune: ") and text[-1].endswith(("name another", "name another folder"))


def test_a_folder_that_is_read_only_is_said(tmp_path, monkeypatch):
    """A folder without the right to write is named, also as the parent of one that is to be made; others pass."""
    check_folder(tmp_path)
    check_folder(tmp_path / "new" / "er")
    monkeypatch.setattr("finetune.utils.files.os.access", lambda path, mode: path != tmp_path)
    for folder in (tmp_path, tmp_path / "new" / "er"):
        with pytest.raises(RecipeError, match=f"no right to write into {tmp_path}; name another folder"):
            check_folder(folder)
