"""Pictures of numbers: they show what they were given, and no input breaks them."""
import math
from dataclasses import replace

import pytest
import torch
from helpers import SmallNet, fixed_weights, images, randn, says, small_guider

from ppap_core.guidance.gradients import energy_gradient, slice_guider
from ppap_core.guidance.terms import TermRecord
from ppap_core.guiders.guider import IgnoreSigma, clean
from ppap_core.guiders.rules import RULES, rule_guider
from ppap_core.guiders.targets import image_target, map_target, number_target
from ppap_core.guiders.tasks import TASKS
from ppap_core.guiders.visualize import draw_output, visualize
from ppap_core.guiders.watched import seen_by, watched
from ppap_core.viz.colors import color, depth_picture, label_picture, labels_of_picture
from ppap_core.viz.drawing import bar_chart, contact_sheet, fitting, font, note_picture, save_picture
from ppap_core.viz.intervals import HEAD, MARGIN, IntervalRow, interval_plot
from ppap_core.viz.plots import Axes, guidance_plot, line_plot, loss_plot


def is_picture(image: torch.Tensor, height: int | None = None, width: int | None = None) -> bool:
    fits = height is None or image.shape == (1, 3, height, width)
    return fits and image.dtype == torch.float32 and image.shape[:2] == (1, 3) and image.min() >= -1 and image.max() <= 1


def pixels_of(image: torch.Tensor, index: int) -> torch.Tensor:
    """The pixels (n, 2) of a picture that have the colour of a line, as row and column."""
    shade = torch.tensor(color(index)).float() / 127.5 - 1
    return ((image[0] - shade[:, None, None]).abs().amax(0) < 0.01).nonzero()


def test_a_plot_has_its_size_and_a_colour_for_each_line():
    plot = line_plot({"up": [(0, 0), (1, 1)], "down": [(0, 1), (1, 0)]}, "title", Axes("x", "y"), size=(300, 500))
    assert is_picture(plot, 300, 500)
    for index in (0, 1):
        line = pixels_of(plot, index)
        line = line[line[:, 1] < 300]  # without the legend
        rising = torch.corrcoef(line.T.float())[0, 1]
        assert len(line) > 100 and (rising < -0.9 if index == 0 else rising > 0.9)  # rows count downwards


def test_the_names_of_many_lines_stand_beside_the_plot():
    """Many names stand beside the plot and hide none of it."""
    def plot(count: int) -> torch.Tensor:
        return line_plot({f"line {index}": [(0, index), (1, index)] for index in range(count)}, "", Axes("x", "y"))
    few, many = (pixels_of(plot(count), 0)[:, 1] for count in (4, 5))
    assert len(many.unique()) < len(few.unique())
    inside = many[many < 600]
    assert inside.max() - inside.min() > 400 and many.max() > inside.max() + 10, "the line ends before its name begins"


def test_many_single_points_are_numbered_and_few_are_not():
    def ink(count: int) -> int:
        plot = line_plot({f"point {index}": [(index, index)] for index in range(count)}, "", Axes("x", "y"), size=(300, 500))
        shade = torch.tensor((40, 40, 46)).float() / 127.5 - 1
        found = ((plot[0] - shade[:, None, None]).abs().amax(0) < 0.3).nonzero()
        return sum(1 for row, column in found.tolist() if 75 < column < 380 and 50 < row < 240 and column - row < 130)
    assert ink(5) > 10 + ink(4)


@pytest.mark.parametrize("log_x", [False, True])
@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("points", [
    [], [(1.0, 2.0)], [(1.0, 2.0), (3.0, 2.0)], [(0.0, 1.0), (1.0, 0.0)], [(-1.0, -2.0), (-3.0, -4.0)],
    [(1.0, math.nan), (2.0, 3.0)], [(math.nan, math.nan)], [(1.0, math.inf), (2.0, 1e30), (3.0, 1e-30)],
    [(1e-9, 1e-9), (1.1e-9, 1.1e-9)], [(1e6, 1.0), (1e6 + 1e-3, 1.0 + 1e-12)], [(0, 0), (80, 7)],
])
def test_no_points_break_a_plot(points, log_x, log_y):
    assert is_picture(line_plot({"line": points}, "title", Axes("x", "y", log_x, log_y)), 420, 720)


def test_no_series_is_a_plot_that_says_so():
    assert is_picture(line_plot({}, "title", Axes("x", "y")), 420, 720)


def test_the_loss_of_every_expert_is_drawn():
    plot = loss_plot({f"expert {k}": [1 / (1 + step) + k for step in range(200)] for k in range(3)})
    assert is_picture(plot) and all(len(pixels_of(plot, k)) > 30 for k in range(3))
    for losses in ({}, {"expert 0": []}, {"expert 0": [1.0]}, {"expert 0": [math.nan, 1.0]}):
        assert is_picture(loss_plot(losses))


def test_the_readings_of_guidance_are_drawn():
    records = [TermRecord(k, sigma, torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.2]))
                for sigma in (5.0, 1.0, 0.1) for k in (0, 1)]
    assert is_picture(guidance_plot(["one", "two"], records)) and is_picture(guidance_plot(["one"], []))


def test_a_contact_sheet_shows_every_row_under_its_name():
    rows = {"red": torch.tensor([1.0, -1, -1])[:, None, None].expand(2, 3, 5, 7), "more than fit": images(9)[:, :, :5, :7]}
    sheet = contact_sheet(rows, scale=2, columns=4)
    assert is_picture(sheet, 2 * (10 + 26) + 4, 4 * (14 + 4) + 4)
    red = (sheet[0] == torch.tensor([1.0, -1, -1])[:, None, None]).all(0)
    assert int(red.sum()) == 2 * 10 * 14


def test_a_picture_saved_as_png_comes_back(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    image = (randn(1, 3, 5, 7).tanh() * 127.5).round() / 127.5
    image = ((image + 1) * 127.5).round() / 127.5 - 1
    save_picture(image, tmp_path / "x.png")
    data = torch.tensor(list(image_module.open(tmp_path / "x.png").tobytes())).reshape(5, 7, 3).permute(2, 0, 1)
    torch.testing.assert_close(data.float() / 127.5 - 1, image[0], rtol=0, atol=1e-6)


def test_depth_is_drawn_with_the_nearest_white_whatever_its_unit():
    depth = torch.linspace(300, 900, 35).reshape(1, 1, 5, 7)
    picture = depth_picture(torch.cat([depth, depth / 1e4 - 3]))
    assert picture.shape == (2, 3, 5, 7) and picture[0, :, 0, 0].tolist() == [-1] * 3
    assert picture[0, :, -1, -1].tolist() == pytest.approx([1] * 3)
    torch.testing.assert_close(picture[0], picture[1], rtol=0, atol=1e-3)
    assert bool(depth_picture(torch.ones(1, 1, 5, 7)).isfinite().all())


@pytest.mark.parametrize("count", [2, 9, 21, 150])
def test_labels_drawn_in_colours_are_read_back(count):
    """Labels come back even from a picture of 8 bits."""
    labels = torch.randint(count, (3, 20, 28), generator=torch.Generator().manual_seed(0))
    picture = label_picture(labels)
    assert picture.shape == (3, 3, 20, 28)
    assert torch.equal(labels_of_picture(picture, count), labels)
    rounded = ((picture + 1) / 2 * 255).round() / 255 * 2 - 1
    assert torch.equal(labels_of_picture(rounded + 0.003, count), labels)


def test_shares_are_drawn_as_bars():
    assert is_picture(bar_chart({"red fox": 0.9, "tabby": 0.1, "none": 0.0}), 256, 256)


def test_sentences_are_broken_at_the_border():
    note = note_picture(["One sentence that is much longer than what fits into a single line of the picture.", "Two."])
    assert is_picture(note, 256, 256) and bool((note[..., -6:] == 1).all()) and bool((note[:, :, 40:80] < 0).any())
    assert is_picture(note_picture([], size=(30, 50)), 30, 50)


# What a guider sees

def ask(guider):
    """A mask guider that was asked about a text; others as they are."""
    net = guider.net
    asked = replace(guider, prompt=randn(1, 6), net=lambda image, sigma, prompt: net(image, sigma))
    return asked if TASKS[guider.task].has_prompt else guider


def is_batch(pictures: torch.Tensor, count: int) -> bool:
    return pictures.shape[:2] == (count, 3) and all(is_picture(each[None].contiguous()) for each in pictures)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("task", TASKS)
def test_what_any_guider_sees_is_one_picture_for_each_image(task, count):
    guider, image = ask(small_guider(task)), images(count)
    aimed, free = visualize(guider, image), visualize(replace(guider, target=None), image)
    assert is_batch(aimed, count) and is_batch(free, count)
    assert torch.equal(aimed, free) == (TASKS[task].preview is not None)


@pytest.mark.parametrize("task", TASKS)
def test_a_watched_guider_is_drawn_without_being_asked_again(task):
    """Not a bit of its energy and gradient changes, and its cut-outs are not what is drawn."""
    whole, image, sigma = ask(small_guider(task)), images(), torch.full((3,), 0.5)
    guider = replace(whole, cutouts=2 if TASKS[task].croppable else 0)
    watching = watched(guider)
    with says(ValueError, "has seen nothing yet", "watched"):
        seen_by(watching)
    for one, other in zip(energy_gradient(guider, image, sigma), energy_gradient(watching, image, sigma), strict=True):
        assert torch.equal(one, other)
    first = slice_guider(whole, slice(0, 1), 3)
    drawn = draw_output(first, *seen_by(watching), lambda: first.energy(image[:1], sigma[:1]))
    torch.testing.assert_close(drawn, visualize(whole, image)[:1], rtol=0, atol=0.02)


def test_several_numbers_are_shown_under_their_names():
    """A target of one of them changes the picture; that of another changes it elsewhere."""
    net = IgnoreSigma(fixed_weights(SmallNet((3,))))
    guider, image = replace(small_guider("number"), net=net, labels=("valence", "arousal", "age"), target=None), images()
    free, first, second = (visualize(each, image) for each in (
        guider, guider.aim(number_target(guider, 2.0, "valence")), guider.aim(number_target(guider, 2.0, "arousal"))))
    assert is_batch(free, 3) and not torch.equal(free, first) and not torch.equal(first, second)


@pytest.mark.parametrize("name", RULES)
def test_what_any_rule_reads_is_one_picture_for_each_image(name):
    guider, image = rule_guider(name), images()
    for each in (guider, guider.aim(image_target(guider, image[:1]))):
        assert is_batch(visualize(each, image), 3)


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.dense and task.from_map])
def test_a_map_that_a_guider_sees_can_be_its_target(task):
    guider, image = ask(small_guider(task)), images()
    own, other = (guider.aim(map_target(guider, visualize(guider, each))) for each in (image, image.flip(0)))
    assert bool((own.score(image, clean(image)) > 0.8).all())
    assert own.energy(image, clean(image)).sum() <= other.energy(image, clean(image)).sum()


def test_a_mask_guider_that_was_not_asked_sees_nothing():
    with says(ValueError, "small/mask", "not asked yet", "aim it at a text"):
        visualize(replace(small_guider("mask"), read_text=lambda text: randn(1, 4)), images())


def test_the_colours_of_an_image_are_stripes_by_share():
    shades = torch.tensor([[1.0, 0.2, 0.2], [-0.8, -0.6, -1.0], [0.0, -0.2, 0.1], [-0.8, -0.6, -1.0]])
    image = shades.T[None, :, None].expand(1, 3, 20, 4).repeat_interleave(7, dim=3)
    stripes = visualize(rule_guider("colours"), image)
    assert stripes.shape == (1, 3, 256, 256)
    for column, shade in ((5, 1), (122, 1), (134, 2), (188, 2), (196, 0), (250, 0)):
        torch.testing.assert_close(stripes[0, :, :, column], shades[shade][:, None].expand(-1, 256))


def test_a_layout_is_shown_in_its_cells():
    guider, image = rule_guider("layout"), images()
    cells = guider.predict(image, clean(image))
    assert torch.equal(visualize(guider, image), cells.repeat_interleave(32, dim=2).repeat_interleave(32, dim=3))


def test_the_bar_grows_as_an_image_nears_its_target():
    guider, image = small_guider("embedding"), images(1)
    def filled(guider) -> int:
        return int(((visualize(guider, image)[0] * 127.5 + 127.5).round() == torch.tensor([170, 200, 245])[:, None, None])
                   .all(0).sum())
    own = guider.predict(image, clean(image))
    assert filled(guider.aim(own)) > 1.5 * filled(guider.aim(own + 3 * own.norm() * randn(1, 6).sign() / 6**0.5))


def test_a_class_guider_takes_no_map():
    with says(ValueError, "small/class", "class"):
        map_target(small_guider(), images(1))



def test_a_band_is_as_wide_as_the_steps_of_its_expert():
    """Four steps of 174 pixels between margins of 12: the first at rest, two of expert 2, one without experts."""
    rows = [IntervalRow("some", [1, 1, 1, None], [0.0, 1.0, 0.5, -1.0]), IntervalRow("planned", [0, 0, 0, 0], None)]
    line = interval_plot([8.0, 4.0, 2.0, 1.0], rows)[0, :, MARGIN + HEAD + 1]
    at_rest, expert, plain, margin = (line[:, 12 + place] for place in (87, 261, 609, -6))
    assert [int((line == tint[:, None]).all(0).sum()) for tint in (expert, plain)] == pytest.approx([348, 174], abs=2)
    assert torch.equal(at_rest, margin) and len({tuple(tint.tolist()) for tint in (at_rest, expert, plain)}) == 3


@pytest.mark.parametrize("text", ["short", "a/very/long/name-of-some-network.that_does_not_fit", "x" * 300])
def test_a_text_is_shortened_in_its_middle(text: str):
    shown = fitting(text, 120)
    assert font(13).getlength(shown) <= 120 and shown[0] == text[0] and shown[-1] == text[-1]
    assert (shown == text) == (text == "short") and fitting(text, 10_000) == text
