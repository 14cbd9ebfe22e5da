"""Edits, training and scorers on a card: what stays there, what comes back. The card is a stand-in that records transfers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EDITS = ["st", "gst", "gst on inductor", "qwen"]


@pytest.fixture(scope="module")
def results() -> Any:
    """What every case of `on_card.py` did, by name."""
    script = Path(__file__).with_name("on_card.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=script.parent)
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", EDITS)
def test_an_edit_on_the_card_is_the_edit_on_the_cpu(results: Any, case: str) -> None:
    assert results[case]["problem"] == ""
    assert results[case]["difference"] < 1e-5
    assert results[case]["places"] == ["card:0"], "every encoding lies on the card"


@pytest.mark.parametrize("case", [*EDITS, "service"])
def test_the_denoising_loop_neither_waits_nor_transfers(results: Any, case: str) -> None:
    assert "loop" not in results[case]["events"]


@pytest.mark.parametrize("case", EDITS)
def test_only_the_result_comes_back(results: Any, case: str) -> None:
    events = results[case]["events"]["decode"]
    downloads = {place: number for place, number in events.items() if place.startswith("download")}
    assert [place.split(":")[0] for place in downloads] == ["download at editor.py"]
    assert set(downloads.values()) == {1}
    assert not [place for place in events if place.startswith("sync")]


def test_encoding_a_flux_edit_uploads_its_inputs_and_waits_for_nothing(results: Any) -> None:
    events = results["st"]["events"]["encode"]
    assert {place.split(" ")[0] for place in events} == {"upload"}
    # The image, its ids, the tokens of two encoders, text ids, noise, guidance, alphas (those of the first step and those of
    # all steps), masks, and the noise levels (two).
    assert sum(events.values()) == 12, events


def test_served_edits_are_those_of_the_cpu_and_come_back_decoded(results: Any) -> None:
    served = results["service"]
    # Batches may be put together differently, which rounds differently.
    assert served["difference"] <= 1
    downloads = [place for place in served["events"]["encode and decode"] if not place.startswith("upload")]
    assert [place.split(":")[0] for place in downloads] == ["download at service.py"]


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [
        ("an item() in the loop", {"sync"}),
        ("a copy in each step", {"download", "upload"}),
        ("latents on the CPU", {"download", "upload"}),
    ],
)
def test_the_card_notices_faults_in_the_loop(results: Any, fault: str, kinds: set[str]) -> None:
    found = results[fault]["events"]["loop"]
    assert {place.split(" ")[0] for place in found} == kinds
    assert set(found.values()) == {3}, "one in every step"


TRAINERS = ["train st", "train gst", "train concepts", "train offsets"]
SCORERS = ["clip", "siglip", "blip-itm", "dinov2"]


@pytest.mark.parametrize("case", TRAINERS)
def test_training_on_the_card_learns_what_it_learns_on_the_cpu(results: Any, case: str) -> None:
    trained = results[case]
    assert trained["places"] == ["card"]
    assert trained["size"] > 1e-3, "three steps change the parameters"
    assert trained["difference"] < 1e-3 * trained["size"], "data and noise do not depend on the device"


@pytest.mark.parametrize("case", TRAINERS)
def test_a_training_step_waits_once_for_its_loss_and_downloads_nothing_else(results: Any, case: str) -> None:
    events = results[case]["events"]["steps"]
    waits = {place.split(":")[0]: number for place, number in events.items() if place.startswith("sync")}
    assert waits == {"sync at trainer.py": 3}
    # The result is downloaded, in `result`, after the last step.
    owner = {"train concepts": "concepts.py", "train offsets": "attribute_offsets.py"}.get(case, "suppression.py")
    assert {place.split(":")[0] for place in events if place.startswith("download")} == {f"download at {owner}"}


@pytest.mark.parametrize("stage", ["autoencoder", "decoder", "editor", "guidance"])
def test_a_stage_of_the_portraits_recipe_draws_and_trains_on_the_card(results: Any, stage: str) -> None:
    """Nothing meets on two devices, which would have raised, and the host waits for no value between steps."""
    events = results["train editor"]["events"][stage]
    waits = {place.split(":")[0] for place in events if not place.startswith("upload")}
    assert waits == set()


@pytest.mark.parametrize("case", SCORERS)
def test_scorers_on_the_card_score_as_on_the_cpu_and_only_scores_come_back(results: Any, case: str) -> None:
    scored = results[case]
    assert (scored["scored"], scored["difference"] < 1e-5) == (3, True)
    kinds = [place.split(" ")[0] for place in scored["events"][""]]
    assert "upload" in kinds, "the images are scored on the card"
    assert kinds.count("download") == 1
