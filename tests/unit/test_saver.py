"""Which checkpoints stay."""

import json

import pytest

from treepo_mcore.actor.saver import PART, STATE, Keep, superfluous

ACCURACY = {10: 0.9, 20: 0.2, 30: None, 40: 0.8, 50: None, 60: 0.7}


@pytest.mark.parametrize(
    ("keep", "stay"),
    [
        (Keep(1), {60}),
        (Keep(2), {50, 60}),
        (Keep(1, every=20), {20, 40, 60}),
        (Keep(1, best=2), {10, 40, 60}),
        (Keep(1, every=30, best=1), {10, 30, 60}),
        (Keep(9), set(ACCURACY)),
    ],
)
def test_what_stays(tmp_path, keep, stay):
    for step, accuracy in (ACCURACY | {70: 1.0}).items():  # the last of a run that was not continued
        folder = tmp_path / f"iter_{step:07d}"
        folder.mkdir()
        (folder / STATE).write_text(json.dumps({"accuracy": accuracy}))
    (tmp_path / f"iter_0000055{PART}").mkdir()
    found = {int(folder.name[5:]) for folder in superfluous(tmp_path, "iter_0000060", keep)}
    assert set(ACCURACY) - found == stay
    assert found <= set(ACCURACY)
