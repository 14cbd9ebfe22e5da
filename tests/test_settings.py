"""Settings: one value for every way to ask for an edit, and one for every way to run a server."""

from __future__ import annotations

import pickle
import typing
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest

from slideredit_rt.cli import _parser
from slideredit_rt.commands.edit import edit_settings
from slideredit_rt.commands.serving import serve_settings
from slideredit_rt.errors import SliderEditError
from slideredit_rt.serving.schemas import EditFields
from slideredit_rt.serving.settings import ServeSettings
from slideredit_rt.settings import EditOptions, EditSettings, merge

ASKED = EditSettings("make the circle red", 7, 5, 2.5, 3.0, "blur")


def test_keyword_arguments_are_the_fields() -> None:
    assert typing.get_type_hints(EditOptions) == typing.get_type_hints(EditSettings)


def test_what_is_given_by_name_goes_before_the_settings() -> None:
    assert merge(None, {}) == EditSettings()
    assert merge(None, {"seed": 7}) == EditSettings(seed=7)
    assert merge(ASKED, {"steps": None}) == EditSettings("make the circle red", 7, None, 2.5, 3.0, "blur")
    with pytest.raises(TypeError, match="stepz"):
        merge(ASKED, {"stepz": 3})  # type: ignore[typeddict-unknown-key]


def test_they_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        ASKED.seed = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": 2**64}, "the seed is 18446744073709551616; pass a whole number from −2⁶³ to 2⁶⁴ − 1"),
        ({"seed": -(2**63) - 1}, "the seed is -9223372036854775809"),
        ({"seed": 0.5}, r"the seed is 0\.5"),
        ({"steps": 0}, "the number of denoising steps is 0; pass at least 1"),
        ({"guidance_scale": float("nan")}, "the guidance scale is nan; pass a finite number"),
        ({"true_cfg_scale": float("inf")}, "the true-CFG scale is inf; pass a finite number"),
    ],
)
def test_values_that_make_no_edit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SliderEditError, match=message):
        EditSettings(**given)


def test_the_command_line_and_http_say_the_same() -> None:
    command = ["edit", "engine", "--image", "i.png", "--slider", "make the circle red", "--out", "o.png"]
    options = ["--prompt", str(ASKED.prompt), "--seed", "7", "--steps", "5", "--guidance-scale", "2.5"]
    options += ["--true-cfg-scale", "3", "--negative-prompt", "blur"]
    body = {field.name: getattr(ASKED, field.name) for field in fields(ASKED) if field.name != "steps"}
    parse, of_body = _parser().parse_args, EditFields.model_validate
    assert edit_settings(parse([*command, *options])) == of_body(body | {"num_inference_steps": 5}).settings(4) == ASKED
    assert edit_settings(parse(command)) == of_body({}).settings(preview_steps=4) == EditSettings()
    assert of_body({"preview": True}).settings(preview_steps=4) == EditSettings(steps=4)


class TestServing:
    def test_the_command_line_says_every_field(self) -> None:
        command = (
            "serve engine --host ::1 --port 9 --model m --api-key k --allowed-host A.example --allow-origin https://b.example"
        )
        command += " --base c --threads 2 --max-queue 3 --max-batch 4 --no-step-batching --cache-mib 5 --no-latent-cache"
        command += " --adapters d --adapters-mib 6 --max-megapixels 7 --max-body-mib 8 --request-seconds 9 --preview-steps 10"
        command += " --preview-decoder e --drain-seconds 11 --min-replicas 12 --max-replicas 13 --replica-cpus 14"
        command += " --replica-gpus 15 --device cuda --dtype bfloat16 --offload encoders"
        asked = ServeSettings(
            engine=Path("engine"),
            host="::1",
            port=9,
            model="m",
            api_key="k",
            allowed_host=("a.example",),
            allow_origin=("https://b.example",),
            base="c",
            threads=2,
            max_queue=3,
            max_batch=4,
            step_batching=False,
            cache_mib=5,
            latent_cache=False,
            adapters=Path("d"),
            adapters_mib=6,
            max_megapixels=7,
            max_body_mib=8,
            request_seconds=9,
            preview_steps=10,
            preview_decoder="e",
            drain_seconds=11,
            min_replicas=12,
            max_replicas=13,
            replica_cpus=14,
            replica_gpus=15,
            device="cuda",
            dtype="bfloat16",
            offload="encoders",
        )
        default = ServeSettings()
        same = [field.name for field in fields(asked) if getattr(asked, field.name) == getattr(default, field.name)]
        assert same == ["api_key_file"], "it excludes --api-key"
        assert serve_settings(_parser().parse_args(command.split())) == asked
        assert serve_settings(_parser().parse_args(["serve"])) == ServeSettings()
        assert "api_key='k'" not in repr(asked)

    def test_ray_says_the_same_in_text(self) -> None:
        given = {"engine": "engine", "max_replicas": "4", "step_batching": "false", "max_megapixels": "2.5", "threads": 3}
        expected = ServeSettings(Path("engine"), max_replicas=4, step_batching=False, max_megapixels=2.5, threads=3)
        assert ServeSettings.from_arguments(given) == expected
        for hosts in ("A.example", ["A.example"]):
            assert ServeSettings.from_arguments({"allowed_host": hosts}).allowed_host == ("a.example",)

    def test_paths_are_found_from_any_working_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("base", "decoder"):
            (tmp_path / name).mkdir()

        def settings(folder: Path) -> ServeSettings:
            found = ServeSettings(base=str(folder / "base"), preview_decoder=str(folder / "decoder"))
            return replace(found, engine=folder / "engine", adapters=folder / "adapters", api_key_file=folder / "key")

        assert settings(Path()).from_anywhere() == settings(tmp_path)
        named = ServeSettings(base="shapes-kontext", preview_decoder="madebyollin/taef1")
        assert named.from_anywhere() == named

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"max_quue": "1"}, "'max_quue' is not an option of the server; known: engine, host"),
            ({"max_queue": "many"}, "max_queue is 'many': input should be a valid integer"),
            ({"max_queue": "0"}, "--max-queue is 0; give at least 1"),
            ({"drain_seconds": "nan"}, "--drain-seconds is nan; give at least 0"),
            ({"min_replicas": "3", "max_replicas": "2"}, "--min-replicas is 3 and --max-replicas 2"),
        ],
    )
    def test_what_serves_nobody_is_refused(self, given: dict[str, str], message: str) -> None:
        with pytest.raises(SliderEditError, match=message):
            ServeSettings.from_arguments(given)

    def test_they_reach_a_replica_whole(self) -> None:
        settings = ServeSettings(Path("engine"), api_key="k", allowed_host=("a.example",))
        assert pickle.loads(pickle.dumps(settings)) == settings
