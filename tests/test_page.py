"""The page in a real browser against a real server: what a person does there, and what it shows."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import httpx
import numpy as np
import pytest
import torch
from http_server import as_file, serving
from PIL import Image
from test_adapter_inputs import like

from slideredit_rt.adapters import load_adapter, save_adapter
from slideredit_rt.bench.serve import local_server
from slideredit_rt.engines import BuildSettings
from slideredit_rt.export.build import build_engine
from slideredit_rt.quantization.write import QuantizeSettings, quantize_base
from slideredit_rt.shapes.measurer import measure, response
from slideredit_rt.shapes.world import Example, held_out_examples, scene_image

sync_api = pytest.importorskip("playwright.sync_api", reason="the page's tests drive a browser with playwright")
expect = sync_api.expect
if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

EDITS = "**/v1/images/edits"
THUMB = 20  # width of a slider's thumb in pixels
LARGEST = 1.5

expect.set_options(timeout=30_000)  # a busy machine is no fault


@pytest.fixture(scope="module")
def server(engines: dict[str, Path]) -> Iterator[str]:
    with serving(engines["st"]) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium on this machine; install the package chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, url: str, **options: Any) -> Iterator[Page]:
    """The page in a browser of its own, which must stay on its server and raise nothing."""
    with browser.new_context(viewport={"width": 1280, "height": 900}) if not options else browser.new_context(**options) as c:
        c.grant_permissions(["clipboard-read", "clipboard-write"])
        page = c.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        # A refused request is reported as a failed resource, and is shown by the page.
        page.on("console", lambda m: faults.append(m.text) if m.type == "error" and "Failed to load" not in m.text else None)
        page.on("request", lambda r: None if r.url.startswith((url, "blob:")) else faults.append(r.url))
        page.goto(url)
        yield page
        assert faults == []


@pytest.fixture
def page(browser: Any, server: str) -> Iterator[Page]:
    with opened(browser, server) as page:
        settled(page)
        yield page


@pytest.fixture(scope="module")
def example() -> Example:
    """A circle to recolour and a background to change, in a scene that no recipe trained on."""
    return next(e for e in held_out_examples(64, 2) if [i.attribute for i in e.instructions] == ["circle colour", "background"])


@pytest.fixture(scope="module")
def image(example: Example) -> bytes:
    return as_file(scene_image(example))


@pytest.fixture
def edited(page: Page, example: Example, image: bytes) -> Page:
    """The page with a scene of ours and its two instructions."""
    choose(page, image)
    for number, instruction in enumerate(example.instructions, 1):
        text(page, number).fill(instruction.text)
        text(page, number).press("Enter")
    settled(page)
    return page


def choose(page: Page, data: bytes, name: str = "scene.png", kind: str = "image/png") -> None:
    page.locator("#file").set_input_files({"name": name, "mimeType": kind, "buffer": data})


def text(page: Page, number: int) -> Any:
    return page.get_by_role("textbox", name=f"Instruction {number}")


def strength(page: Page, number: int) -> Any:
    return page.get_by_role("slider", name=f"Strength {number}")


def wait_for(page: Page, requests: list[Route], number: int) -> None:
    """Let the browser go on until so many requests are held, and long enough for one more to show itself."""
    deadline = time.monotonic() + 30
    while len(requests) < number and time.monotonic() < deadline:
        page.wait_for_timeout(20)
    page.wait_for_timeout(150)
    assert len(requests) == number


def settled(page: Page) -> None:
    """Wait for the full edit of what is set now."""
    page.locator("#edited[aria-busy=false] #status.full").wait_for()


def shown(page: Page, canvas: str = "result") -> np.ndarray:
    """The image in a canvas, uint8 `[H, W, 3]`."""
    url = page.evaluate("id => document.getElementById(id).toDataURL()", canvas)
    return pixels(base64.b64decode(url.partition(",")[2]))


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def responses(shown: np.ndarray, example: Example) -> list[float]:
    """How far each instruction of an example was carried out."""
    image = torch.from_numpy(shown.copy()).permute(2, 0, 1)[None].float() / 255
    measured = measure(image, [example.scene])[0]
    return [response(measured, instruction, example.scene) for instruction in example.instructions]


def ask(url: str, image: bytes, sliders: list[dict[str, Any]], **fields: str) -> list[np.ndarray]:
    """What the API makes of the same setting."""
    data = {"sliders": json.dumps(sliders), "seed": "0", **fields}
    answer = httpx.post(f"{url}/v1/images/edits", data=data, files={"image": ("a.png", image, "image/png")}, timeout=60)
    return [pixels(base64.b64decode(item["b64_json"])) for item in answer.raise_for_status().json()["data"]]


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for the rounding of neighbours in a batch."""
    return a.shape == b.shape and int(np.abs(a.astype(int) - b.astype(int)).max()) <= 1


def sent(route: Route) -> dict[str, Any]:
    """The form of a request; `sliders` parsed."""
    body = route.request.post_data_buffer or b""
    found = dict(re.findall(r'name="(\w+)"\r\n\r\n(.*?)\r\n--', body.decode("latin-1"), re.DOTALL))
    return {**found, "sliders": json.loads(found["sliders"])}


def drag(page: Page, number: int, value: float, moves: int = 12, release: bool = True) -> None:
    """Take a slider's thumb with the mouse and pull it to `value`."""
    slider = strength(page, number)
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()

    def place(at: float) -> tuple[float, float]:
        return box["x"] + THUMB / 2 + (box["width"] - THUMB) * at / LARGEST, box["y"] + box["height"] / 2

    page.mouse.move(*place(float(slider.input_value())))
    page.mouse.down()
    page.mouse.move(*place(value), steps=moves)
    if release:
        page.mouse.up()


# ---------------------------------------------------------------- the edit


def test_the_sample_is_edited_before_anything_is_touched(page: Page) -> None:
    assert text(page, 1).input_value() == "make the circle red"
    assert shown(page).shape == shown(page, "source").shape == (64, 64, 3)
    assert not same(shown(page), shown(page, "source"))
    expect(page.locator("#status")).to_have_text(re.compile(r"^full · 28 steps, [\d.]+ m?s · preview [\d.]+ m?s$"))


@pytest.mark.slow
def test_a_drag_shows_its_preview_within_half_a_second(browser: Any, engines: dict[str, Path]) -> None:
    """On a quiet machine: the median over drags, from the last move to the image, as the page itself reports it."""
    took: list[float] = []
    with local_server(str(engines["st"])) as (url, _), opened(browser, url) as page:
        settled(page)
        for number in range(25):
            drag(page, 1, [0.25, 1.25, 0.75][number % 3])
            page.wait_for_timeout(100)  # until the status is of this drag
            settled(page)
            took += map(float, re.findall(r"preview (\d+) ms", page.locator("#status").inner_text()))
    assert len(took) == 25
    median = statistics.median(took)
    sys.stdout.write(f"\npreviews: median {median:g} ms, {max(took):g} ms at most\n")
    assert median <= 500


def test_dragging_a_slider_carries_its_instruction_out_as_far_as_it_says(
    edited: Page, server: str, example: Example, image: bytes
) -> None:
    seen: dict[float, list[float]] = {}
    for target in (0.0, 1.0, 1.5):
        drag(edited, 1, target)
        settled(edited)
        value = float(strength(edited, 1).input_value())
        assert value == pytest.approx(target, abs=0.02)
        assert edited.locator("output").first.inner_text() == f"{value:.2f}"
        sliders = [{"instruction": i.text, "strength": s} for i, s in zip(example.instructions, (value, 1), strict=True)]
        (expected,) = ask(server, image, sliders)
        assert same(shown(edited), expected)
        seen[target] = responses(shown(edited), example)
    moved, other = zip(*seen.values(), strict=True)
    assert abs(moved[0]) < 0.15
    assert moved[1] == pytest.approx(1, abs=0.15)
    assert moved[2] > max(moved[1], 1)
    assert max(other) - min(other) < 0.1


def test_a_second_slider_leaves_the_first_instruction_alone(edited: Page, example: Example) -> None:
    before = responses(shown(edited), example)
    drag(edited, 2, 0)
    settled(edited)
    after = responses(shown(edited), example)
    assert abs(after[0] - before[0]) < 0.1
    assert before[1] - after[1] > 0.75


def test_the_edit_follows_while_the_mouse_is_still_down(edited: Page, example: Example) -> None:
    before = responses(shown(edited), example)[0]
    drag(edited, 1, 0.1, moves=30, release=False)
    expect(edited.locator("#status.preview")).to_have_text(re.compile(r"^preview · [\d.]+ m?s$"))
    expect(edited.locator("#edited")).to_have_attribute("aria-busy", "false")
    assert before - responses(shown(edited), example)[0] > 0.6
    edited.mouse.up()
    settled(edited)


def test_keys_move_a_slider_and_home_and_a_double_click_bring_it_back(edited: Page) -> None:
    at_one = shown(edited)
    slider = strength(edited, 1)
    slider.focus()
    for _ in range(40):
        edited.keyboard.press("ArrowLeft")
    settled(edited)
    assert slider.input_value() == "0.6"
    assert not same(shown(edited), at_one)
    edited.keyboard.press("Home")
    settled(edited)
    assert slider.input_value() == "1"
    assert same(shown(edited), at_one)
    edited.keyboard.press("End")
    assert slider.input_value() == "1.5"
    slider.dblclick()
    settled(edited)
    assert slider.input_value() == "1"
    assert same(shown(edited), at_one)


def test_a_seed_of_ones_own_and_a_new_one(edited: Page, server: str, example: Example, image: bytes) -> None:
    edited.get_by_label("Seed", exact=True).fill("7")
    settled(edited)
    sliders = [{"instruction": i.text, "strength": 1} for i in example.instructions]
    assert same(shown(edited), ask(server, image, sliders, seed="7")[0])
    edited.get_by_role("button", name="New seed").click()
    settled(edited)
    seed = edited.get_by_label("Seed", exact=True).input_value()
    assert seed != "7"
    assert same(shown(edited), ask(server, image, sliders, seed=seed)[0])


# ---------------------------------------------------------------- requests


def test_one_request_at_a_time_and_the_newest_setting_next(edited: Page) -> None:
    held: list[Route] = []
    asked: list[float] = []

    def hold(route: Route) -> None:
        asked.append(sent(route)["sliders"][0]["strength"])
        held.append(route)

    edited.route(EDITS, hold)
    drag(edited, 1, 0.2, moves=25, release=False)
    wait_for(edited, held, 1)  # 25 moves, and the first is still on its way
    held.pop().continue_()
    expect(edited.locator("#status.preview")).to_be_visible()
    wait_for(edited, held, 1)
    assert asked[1] == float(strength(edited, 1).input_value()), "the next request was not for the newest setting"
    held.pop().continue_()
    edited.unroute(EDITS)
    edited.mouse.up()
    settled(edited)


def test_a_full_edit_is_dropped_when_a_slider_moves(edited: Page, server: str, example: Example, image: bytes) -> None:
    held: list[Route] = []
    edited.route(EDITS, lambda route: route.continue_() if "preview" in sent(route) else held.append(route))
    drag(edited, 1, 0)
    expect(edited.locator("#status.preview")).to_be_visible()
    wait_for(edited, held, 1)
    with edited.expect_event("requestfailed", lambda request: request == held[0].request):
        drag(edited, 1, 0.5, release=False)
    edited.unroute(EDITS)
    edited.mouse.up()
    settled(edited)
    value = float(strength(edited, 1).input_value())
    sliders = [{"instruction": i.text, "strength": s} for i, s in zip(example.instructions, (value, 1), strict=True)]
    assert same(shown(edited), ask(server, image, sliders)[0])


def test_a_late_answer_for_another_image_is_never_shown(edited: Page, server: str, example: Example, image: bytes) -> None:
    held: list[Route] = []
    edited.route(EDITS, lambda route: route.continue_() if held else held.append(route))
    drag(edited, 1, 0)
    wait_for(edited, held, 1)
    other = held_out_examples(9, 2)[8]
    choose(edited, as_file(scene_image(other)))
    settled(edited)
    newest = shown(edited)
    # The page has given the request up; its answer comes all the same.
    held[0].fulfill(json={"data": [{"b64_json": base64.b64encode(image).decode()}]})
    edited.wait_for_timeout(200)
    assert same(shown(edited), newest)
    assert not same(newest, pixels(image))


# ---------------------------------------------------------------- prompt, errors, keys


def test_the_prompt_shows_which_tokens_each_slider_owns(page: Page, server: str) -> None:
    page.get_by_role("button", name="Add an instruction").click()
    instructions = ["make the circle 🔴 red", "make it snow", "make the square smaller"]
    for number, instruction in enumerate(instructions, 1):
        text(page, number).fill(instruction)
    text(page, 3).press("Enter")
    prompt = " and ".join(instructions)
    numbered = " and ".join(f"{number}{instruction}" for number, instruction in enumerate(instructions, 1))
    expect(page.locator("#prompt")).to_have_text(numbered)
    marks = page.locator("#prompt mark")
    assert [m.locator("sup").inner_text() for m in marks.all()] == ["1", "2", "3"]
    for mark, instruction in zip(marks.all(), instructions, strict=True):
        assert mark.inner_text()[1:] == instruction
    # Each token has a line of its own. A token for a space alone shares its characters with the one after it.
    spans = httpx.post(f"{server}/v1/sliders/spans", json={"sliders": [{"instruction": i} for i in instructions]}).json()
    owned = {t["start"]: t["end"] for t in spans["tokens"] if t["slider"] is not None}
    assert marks.locator("span").all_inner_texts() == [prompt[start:end].strip() for start, end in owned.items()]
    # The colour of a slider is that of its words, and so that it does not stand alone, the lines differ.
    badges = [b.evaluate("e => getComputedStyle(e).backgroundColor") for b in page.locator(".badge").all()]
    lines = [m.locator("span").first.evaluate("e => getComputedStyle(e).borderBottom") for m in marks.all()]
    assert all(line.endswith(badge) for line, badge in zip(lines, badges, strict=True))
    assert len({line.split(" ")[1] for line in lines}) == 3


def test_a_refusal_is_shown_in_the_servers_words_and_the_image_stays(page: Page, server: str) -> None:
    before = shown(page)
    text(page, 2).fill("make the circle red and make")
    text(page, 2).press("Enter")
    sliders = [{"instruction": text(page, number).input_value()} for number in (1, 2)]
    answer = httpx.post(f"{server}/v1/sliders/spans", json={"sliders": sliders})
    assert answer.status_code == 422
    alert = page.get_by_role("alert")
    expect(alert.locator("p")).to_have_text(answer.json()["error"]["message"])
    assert same(shown(page), before)
    expect(page.get_by_role("button", name="Copy curl")).to_be_disabled()
    text(page, 2).fill("make the background dark")
    text(page, 2).press("Enter")
    settled(page)
    expect(alert.locator("p")).to_have_text("")
    assert same(shown(page), before)


def test_a_server_that_is_gone_is_said_and_asked_again(page: Page) -> None:
    before = shown(page)
    page.route(EDITS, lambda route: route.abort())
    drag(page, 1, 0.3)
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    assert same(shown(page), before)
    page.unroute(EDITS)
    page.get_by_role("button", name="Try again").click()
    settled(page)
    expect(page.get_by_role("alert").locator("p")).to_have_text("")
    assert not same(shown(page), before)


def test_sliders_come_and_go(page: Page) -> None:
    both = shown(page)
    page.get_by_role("button", name="Remove instruction 2").click()
    settled(page)
    expect(text(page, 1)).to_be_focused()
    assert not same(shown(page), both)
    page.get_by_role("button", name="Remove instruction 1").click()
    expect(page.locator("#status")).to_have_text("no instruction yet")
    expect(text(page, 1)).to_have_value("")
    assert same(shown(page), shown(page, "source"))
    for instruction in ("make the circle red", "make the background dark"):
        page.keyboard.type(instruction)
        page.get_by_role("button", name="Add an instruction").click()
    settled(page)
    assert same(shown(page), both)


@pytest.mark.parametrize("default", [None, "shapes-st"])
def test_the_adapters_of_a_folder_can_be_chosen(
    browser: Any, default: str | None, image: bytes, example: Example, tmp_path: Path
) -> None:
    build_engine("shapes-kontext", default, tmp_path / "any", BuildSettings(adapter_inputs=True), progress=False)
    shipped = load_adapter("shapes-st")
    save_adapter(shipped, tmp_path / "adapters" / "shapes.safetensors")
    save_adapter(like(shipped, 4), tmp_path / "adapters" / "other.safetensors")
    sliders = [{"instruction": i.text, "strength": s} for i, s in zip(example.instructions, (0.0, 1), strict=True)]
    with serving(tmp_path / "any", adapters=tmp_path / "adapters") as url, opened(browser, url) as page:
        choose(page, image)
        for number, slider in enumerate(sliders, 1):
            text(page, number).fill(slider["instruction"])
            text(page, number).press("Enter")
        settled(page)
        strength(page, 1).fill("0")
        settled(page)
        choice = page.get_by_label("Adapter", exact=True)
        own = [] if default is None else ["the engine’s own"]
        assert choice.locator("option").all_inner_texts() == [*own, "other", "shapes"]
        seen = []
        for name in ("shapes", "other"):
            choice.select_option(name)
            settled(page)
            seen.append(shown(page))
            assert page.locator("#error").inner_text() == "", "a refused request leaves the last edit and its status"
            assert same(seen[-1], ask(url, image, sliders, adapter=name)[0])
            expect(page.locator("#curl")).to_contain_text(f"--form-string 'adapter={name}'")
        assert not same(*seen)
        if default is not None:
            choice.select_option("the engine’s own")
            settled(page)
            assert same(shown(page), seen[0])


def test_an_engine_with_its_own_adapter_alone_has_no_choice(page: Page) -> None:
    expect(page.get_by_label("Adapter", exact=True)).to_be_hidden()


def test_a_gst_engine_has_one_slider(browser: Any, engines: dict[str, Path]) -> None:
    with serving(engines["gst"]) as url, opened(browser, url) as page:
        settled(page)
        assert page.locator("#sliders li").count() == 1
        expect(page.get_by_role("button", name="Add an instruction")).to_be_hidden()
        expect(page.get_by_role("button", name="Remove instruction 1")).to_be_hidden()
        at_one = shown(page)
        drag(page, 1, 0)
        settled(page)
        source = shown(page, "source").astype(int)
        assert np.abs(shown(page) - source).mean() < 0.4 * np.abs(at_one - source).mean()


def test_the_engines_precision_is_shown(browser: Any, tmp_path: Path) -> None:
    quantize_base("shapes-kontext", tmp_path / "base", QuantizeSettings("int8"), progress=False)
    build_engine(tmp_path / "base", "shapes-gst", tmp_path / "engine", progress=False)
    with serving(tmp_path / "engine") as url, opened(browser, url) as page:
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["engine"]["precision"] == "int8"
        expect(page.locator("#engine")).to_have_text("shapes-kontext · GST sliders · onnxruntime · int8")
        settled(page)


def test_a_key_is_asked_for_and_stays_in_the_tab(browser: Any, engines: dict[str, Path]) -> None:
    with serving(engines["st"], api_key="secret") as url, opened(browser, url) as page:
        field = page.get_by_label("API key of this server")
        expect(field).to_be_focused()
        field.fill("guess")
        field.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("API key is wrong")
        field.fill("secret")
        field.press("Enter")
        settled(page)
        expect(field).to_be_hidden()
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.get_by_role("button", name="Copy curl").click()
        command = page.evaluate("navigator.clipboard.readText()")
        assert "secret" not in command
        assert '-H "Authorization: Bearer $SLIDEREDIT_API_KEY"' in command


# ---------------------------------------------------------------- images


def test_an_image_can_be_dropped_or_pasted(page: Page, image: bytes) -> None:
    for event, data in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.get_by_role("button", name="Sample").click()
        settled(page)
        before = shown(page)
        page.evaluate(
            """([event, data, base64]) => {
                const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
                const transfer = new DataTransfer();
                transfer.items.add(new File([bytes], "a.png", { type: "image/png" }));
                const kind = event === "paste" ? ClipboardEvent : DragEvent;
                document.body.dispatchEvent(new kind(event, { [data]: transfer, bubbles: true, cancelable: true }));
            }""",
            [event, data, base64.b64encode(image).decode()],
        )
        expect(page.locator("#edited")).to_have_attribute("aria-busy", "true")
        settled(page)
        assert same(shown(page, "source"), pixels(image))
        assert not same(shown(page), before)


def test_what_is_no_image_is_refused_and_the_old_one_stays(page: Page) -> None:
    before = shown(page), shown(page, "source")
    choose(page, b"no image", "notes.txt", "text/plain")
    expect(page.get_by_role("alert")).to_contain_text("“notes.txt” is not an image")
    settled(page)
    assert same(shown(page), before[0])
    assert same(shown(page, "source"), before[1])


def test_a_large_image_is_sent_with_no_more_pixels_than_are_used(page: Page) -> None:
    choose(page, as_file(Image.new("RGBA", (1600, 1000), (255, 0, 0, 0))))
    settled(page)
    source = shown(page, "source")
    height, width = source.shape[:2]
    assert width * height == pytest.approx(512 * 512, rel=0.01)
    assert width / height == pytest.approx(1.6, rel=0.01)
    assert (source == 255).all(), "what is transparent is sent as white"


def test_the_source_shows_left_of_the_divider_and_while_a_button_is_held(page: Page) -> None:
    stage = page.locator("#stage")

    def looks_like_source(part: slice) -> bool:
        size = (64, 64)
        look = np.asarray(Image.open(io.BytesIO(stage.screenshot())).convert("RGB").resize(size, Image.Resampling.BOX))
        # Away from the divider's grip and the round corners.
        difference = np.abs(look.astype(int) - shown(page, "source"))[4:52, part]
        return bool(np.median(difference) <= 2)

    left, right = slice(4, 28), slice(36, 60)
    assert not looks_like_source(left)
    divider = page.get_by_role("slider", name="Compare")
    box = divider.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert looks_like_source(left)
    assert not looks_like_source(right)
    divider.press("End")
    assert looks_like_source(right)
    divider.press("Home")
    hold = page.get_by_role("button", name="Hold to see the source")
    hold.focus()
    page.keyboard.down("Space")
    expect(hold).to_have_attribute("aria-pressed", "true")
    assert looks_like_source(left)
    assert looks_like_source(right)
    page.keyboard.up("Space")
    expect(hold).to_have_attribute("aria-pressed", "false")
    assert not looks_like_source(left)
    hold.hover()
    page.mouse.down()
    assert looks_like_source(right)
    page.mouse.up()
    assert not looks_like_source(right)


# ---------------------------------------------------------------- exports


def test_the_strip_holds_the_source_and_the_whole_way_of_the_slider_in_focus(
    edited: Page, server: str, example: Example, image: bytes
) -> None:
    strength(edited, 2).focus()
    expect(edited.get_by_text(f"The strip shows slider 2, “{example.instructions[1].text}”, from 0 to 1.5.")).to_be_visible()
    with edited.expect_download() as download:
        edited.get_by_role("button", name="Save the strip").click()
    assert download.value.suggested_filename == "strip.png"
    strip = pixels(download.value.path().read_bytes())
    sliders = [{"instruction": i.text, "strength": 1} for i in example.instructions]
    sweep = json.dumps({"slider": 1, "from": 0, "to": 1.5, "count": 7})
    frames = [pixels(image), *ask(server, image, sliders, sweep=sweep)]
    gap, cell, top = 8, 192, 36
    assert strip.shape == (top + cell + 26, gap + len(frames) * (cell + gap), 3)
    for index, frame in enumerate(frames):
        x = gap + index * (cell + gap)
        assert same(strip[top + 1 : top + cell : 3, x + 1 : x + cell : 3], frame)
        label = strip[top + cell :, x : x + cell]
        assert (label < 128).any(), "no label under the frame"


def test_the_copied_curl_command_makes_the_same_image(edited: Page, tmp_path: Path) -> None:
    # What shells and curl's own forms read specially.
    text(edited, 2).fill("""@it's "$red";b=`c`""")
    text(edited, 2).press("Enter")
    drag(edited, 1, 0.4)
    settled(edited)
    edited.get_by_role("button", name="Copy curl").click()
    expect(edited.get_by_role("button", name="Copied")).to_be_visible()
    command = edited.evaluate("navigator.clipboard.readText()")
    with edited.expect_download() as download:
        edited.get_by_role("button", name="Save image.png").click()
    assert download.value.suggested_filename == "image.png"
    download.value.save_as(tmp_path / "image.png")
    run = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    assert same(pixels((tmp_path / "edited.png").read_bytes()), shown(edited))


def test_the_edit_is_saved_as_it_is_shown(page: Page) -> None:
    with page.expect_download() as download:
        page.get_by_role("button", name="Save the edit").click()
    assert download.value.suggested_filename == "edited.png"
    assert same(pixels(download.value.path().read_bytes()), shown(page))


# ---------------------------------------------------------------- for everybody

NAMED = "button, input, select, summary, canvas[role=img], pre[tabindex]"


def test_everything_has_a_name_and_is_reached_with_the_tab_key_in_its_order(page: Page) -> None:
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.title()
    assert page.locator("h1").count() == page.locator("main").count() == 1
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    unnamed = page.evaluate(
        """(selector) => [...document.querySelectorAll(selector)].filter((e) => e.checkVisibility()).filter((e) =>
            !(e.getAttribute("aria-label") || e.labels?.length || (e.matches("button, summary") && e.textContent.trim()))
        ).map((e) => e.outerHTML)""",
        NAMED,
    )
    assert unnamed == []
    order = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, summary, [tabindex]")]
            .filter((e) => e.checkVisibility() && !e.disabled).map((e) => e.outerHTML)"""
    )
    page.evaluate("document.activeElement.blur()")
    reached, rings = [], []
    for _ in order:
        page.keyboard.press("Tab")
        html, ring = page.evaluate(
            """() => {
                const e = document.activeElement;
                const shown = e.matches(".unseen") ? e.nextElementSibling : e;
                return [e.outerHTML, getComputedStyle(shown).outlineStyle + getComputedStyle(shown).outlineWidth];
            }"""
        )
        reached.append(html)
        rings.append(ring)
    assert reached == order
    assert set(rings) == {"solid3px"}


def contrast(a: str, b: str) -> float:
    """WCAG's contrast ratio of two colours as `rgb(…)`."""

    def luminance(colour: str) -> float:
        channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_the_colours_of_all_sliders_can_be_read(browser: Any, server: str, scheme: str) -> None:
    with opened(browser, server, color_scheme=scheme) as page:
        settled(page)
        colours = page.evaluate(
            """() => {
                const style = (selector) => getComputedStyle(document.querySelector(selector));
                const panel = style(".panel").backgroundColor;
                const badge = document.querySelector(".badge");
                const pairs = [
                    [style("body").color, style("body").backgroundColor], [style("body").color, panel],
                    [style("#engine").color, style("body").backgroundColor], [style(".hint").color, panel],
                ];
                for (let i = 0; i < 8; i++) {
                    badge.closest("li").className = `slider c${i}`;
                    const { color, backgroundColor } = getComputedStyle(badge);
                    pairs.push([color, backgroundColor], [backgroundColor, panel]);
                }
                return pairs;
            }"""
        )
        assert len(set(map(tuple, colours))) == len(colours)
        assert min(contrast(*pair) for pair in colours) >= 4.5
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (contrast(ground, "rgb(0, 0, 0)") > 10) == (scheme == "light")


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_it_fits_narrow_and_wide_windows_and_does_not_move_by_itself(browser: Any, server: str, width: int) -> None:
    with opened(browser, server, viewport={"width": width, "height": 800}, reduced_motion="reduce") as page:
        settled(page)
        page.get_by_text("The same edit with curl").click()
        assert page.evaluate("document.documentElement.scrollWidth") == width
        beyond = page.evaluate(
            """() => [...document.querySelectorAll("main *")]
                .filter((e) => e.checkVisibility() && !e.closest("pre, .unseen, .grip"))
                .filter((e) => { const r = e.getBoundingClientRect(); return r.left < 0 || r.right > innerWidth; })
                .map((e) => e.outerHTML)"""
        )
        assert beyond == []
        small = page.evaluate(
            """() => [...document.querySelectorAll("main *")]
                .filter((e) => e.checkVisibility() && e.textContent.trim() && !e.matches("sup"))
                .map((e) => parseFloat(getComputedStyle(e).fontSize)).reduce((a, b) => Math.min(a, b))"""
        )
        assert small >= 12
        assert page.locator("#result").evaluate("e => getComputedStyle(e).imageRendering") == "pixelated"
        animated = page.evaluate(
            "document.getAnimations().flatMap((a) => a.effect.getKeyframes()).flatMap((keyframe) => Object.keys(keyframe))"
        )
        assert set(animated) <= {"opacity", "offset", "computedOffset", "easing", "composite"}
        assert np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L")).min() < 60


def test_the_page_asks_no_other_host_and_needs_no_inline_code(page: Page, server: str) -> None:
    policy = httpx.get(server).headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "script-src 'self'" in policy
    hosts = page.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert {urlparse(host).netloc for host in hosts if not host.startswith("blob:")} == {urlparse(server).netloc}


def test_the_description_of_the_api_is_shown_from_the_package_alone(browser: Any, server: str) -> None:
    described = httpx.get(f"{server}/openapi.json").json()["paths"]
    operations = {(method.upper(), path) for path, methods in described.items() for method in methods}
    with browser.new_context() as context:
        page = context.new_page()
        faults: list[str] = []
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("requestfailed", lambda request: faults.append(request.url))
        page.on("response", lambda response: None if response.ok else faults.append(response.url))
        page.on("request", lambda request: None if request.url.startswith((server, "data:")) else faults.append(request.url))
        page.goto(f"{server}/docs")
        rows = page.locator(".opblock-summary")
        expect(rows).to_have_count(len(operations))
        shown = [(row.locator(".opblock-summary-method"), row.locator(".opblock-summary-path")) for row in rows.all()]
        assert {(method.inner_text(), path.get_attribute("data-path")) for method, path in shown} == operations

        # It works, too.
        health = page.locator("#operations-health-health_health_get")
        health.get_by_role("button").first.click()
        health.get_by_role("button", name="Try it out").click()
        health.get_by_role("button", name="Execute").click()
        expect(health.locator(".live-responses-table .microlight").first).to_contain_text('"status": "ok"')
        assert faults == []


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[str]:
    """Another server of this machine: its origin. Browsers let pages from elsewhere ask this machine only with permission."""
    (tmp_path / "index.html").write_text("<!doctype html><title>A stranger</title>")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        yield f"http://localhost:{other.server_port}"
        other.shutdown()
        thread.join()


def test_a_page_of_another_site_is_refused_unless_its_origin_is_allowed(
    browser: Any, engines: dict[str, Path], server: str, stranger: str, image: bytes
) -> None:
    fields = {"image": base64.b64encode(image).decode(), "prompt": "make the circle red", "num_inference_steps": 1}
    ask = """async ([url, fields]) => {
        const options = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(fields) };
        try {
            return (await (await fetch(`${url}/v1/images/edits`, options)).json()).size;
        } catch (error) {
            return String(error);
        }
    }"""
    send_blindly = """async ([url, fields]) => {
        const form = new FormData();
        for (const [name, value] of Object.entries(fields)) form.append(name, value);
        await fetch(`${url}/v1/images/edits`, { method: "POST", mode: "no-cors", body: form }).catch(() => null);
    }"""

    def answers(route: str, status: int) -> float:
        found = re.search(rf'responses_total{{route="{route}",status="{status}"}} (.*)', httpx.get(f"{server}/metrics").text)
        return float(found[1]) if found else 0

    with browser.new_context() as context, serving(engines["st"], allowed_origins=[stranger]) as friend:
        page = context.new_page()
        page.goto(stranger)
        edits, refusals = answers("/v1/images/edits", 200), answers("unknown", 403)
        assert page.evaluate(ask, [server, fields]) == "TypeError: Failed to fetch"
        page.evaluate(send_blindly, [server, fields])
        # The preflight of the first one, and the second one, which browsers send without asking.
        assert answers("unknown", 403) == refusals + 2
        assert answers("/v1/images/edits", 200) == edits
        assert page.evaluate(ask, [friend, fields]) == "64x64"
