"""One evaluation of a tiny random model: its answers, its costs, its files, its complaints."""

import json
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import DynamicCache, LlavaForConditionalGeneration

from latefusion.data.scenes import load_scenes
from latefusion.data.sources import scenes as scene_samples
from latefusion.eval import efficiency
from latefusion.eval.evaluate import System, evaluate_run, main
from latefusion.eval.predict import answer_questions, encode_images, prompt_inputs, running
from latefusion.eval.report import tables
from latefusion.eval.report.__main__ import insert
from latefusion.eval.report.figures import standalone, tokens_per_layer
from latefusion.models.attach import attach
from latefusion.models.build import build_student
from latefusion.models.embedded.build import build_config
from latefusion.models.embedded.vocabulary import PAD, VOCABULARY, build_processor
from latefusion.models.schedule import VisionSchedule

LAYERS, WIDTH, HEADS, MLP, VISION = 4, 32, 2, 48, 16
KEEP = VisionSchedule(keep={2: 3})
LATE = VisionSchedule(enter=1, exit=3, keep={2: 5})


def tiny_model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    config = build_config(
        patch_size=24, tower_width=32, tower_layers=1, width=WIDTH, layers=LAYERS, heads=HEADS, mlp=MLP
    )
    config.text_config.initializer_range = 0.3
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = list(range(0, len(VOCABULARY), 3))  # so that answers end somewhere
    model.generation_config.pad_token_id = PAD
    return model


@pytest.fixture(scope="module")
def processor():
    return build_processor(patch_size=24)


@pytest.fixture(scope="module")
def student(processor):
    """A student whose LoRA, entry adapter and projector change the answers."""
    found = build_student(
        tiny_model(),
        processor,
        base="tiny",
        schedule=LATE,
        rank=2,
        alpha=4,
        dropout=0.0,
        entry_rank=2,
        train=["multi_modal_projector"],
    )
    with torch.no_grad():
        for name, parameter in found.model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.5)
    return found


SYSTEMS = {
    "dense": System(name="Dense base", policy=VisionSchedule()),
    "pruned": System(name="Keep three", policy=KEEP),
    "student": System(name="Late fusion", policy=LATE, adapters=True),
}


def naive_answer(model, processor, row) -> tuple[str, int]:
    """One stock `generate` on one prompt without padding: its text, and the number of text tokens."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[row["image"]], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    n_text = int((inputs["input_ids"] != model.config.image_token_id).sum())
    return processor.decode(output, skip_special_tokens=True).strip(), n_text


@pytest.fixture(scope="module")
def naive(student, processor):
    """What each system answers to each question, asked one by one."""
    rows, model, said = load_scenes("test", 2), student.model, {}
    with model.disable_adapter():
        said["dense"] = [naive_with(student, VisionSchedule(), processor, row) for row in rows]
        said["pruned"] = [naive_with(student, KEEP, processor, row) for row in rows]
    said["student"] = [naive_with(student, LATE, processor, row) for row in rows]
    return said


def naive_with(student, policy, processor, row) -> tuple[str, int]:
    with student.attachment.using(policy):
        return naive_answer(student.model, processor, row)


@pytest.fixture(scope="module")
def questions(naive):
    """The scenes, with what the dense model says as the answer to every other question."""
    rows, filler = load_scenes("test", 2), "no no no no no"  # five tokens: evaluation leaves room for six
    said = [text for text, _ in naive["dense"]]
    answers = [text if i % 2 == 0 and len(text.split()) < 5 else filler for i, text in enumerate(said)]
    return rows.remove_columns("answer").add_column("answer", answers)


@pytest.fixture(scope="module")
def run(student, processor, questions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    student.model.train()
    results = evaluate_run(
        model=student.model,
        processor=processor,
        attachment=student.attachment,
        systems=SYSTEMS,
        dataset=questions,
        output_dir=folder,
        title="tiny",
        checkpoint="outputs/tiny",
        batch_size=10,
        latency_prompts=2,
        latency_repeats=2,
    )
    assert student.model.training  # given back as it came
    return folder, results


def test_batched_answers_equal_asking_one_by_one(run, naive, questions):
    folder, results = run
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    for key, said in naive.items():
        mine = [line for line in lines if line["system"] == key]
        assert [line["prediction"] for line in mine] == [text for text, _ in said]
        assert [line["text_tokens"] for line in mine] == [n for _, n in said]
        assert [line["id"] for line in mine] == list(questions["id"])
        right = [text == answer for (text, _), answer in zip(said, questions["answer"], strict=True)]
        assert [line["correct"] for line in mine] == right
        overall = results["systems"][key]["accuracy"]["overall"]
        assert overall["value"] == pytest.approx(np.mean(right)) and overall["n"] == len(right)
    texts = {key: [text for text, _ in said] for key, said in naive.items()}
    assert len(set(texts["dense"])) > 3 and all(a != b for a, b in pairwise(texts.values()))  # else it tests
    assert results["systems"]["dense"]["accuracy"]["overall"]["value"] > 0.3  # little


def test_rows_of_the_training_sources_are_asked_the_same(student, processor):
    asked = {"model": student.model.eval(), "processor": processor, "attachment": student.attachment}
    asked |= {"systems": {"dense": SYSTEMS["dense"]}, "batch_size": 7}
    plain = answer_questions(**asked, dataset=load_scenes("test", 1))["dense"]
    assert answer_questions(**asked, dataset=scene_samples("test", n_scenes=1))["dense"] == plain


def by_hand(n_text: int, vision: list[int]) -> int:
    """FLOPs of a prefill: two a multiply-add of q, k, v, o, scores, weighted sum, gate, up, down."""
    head, total = WIDTH // HEADS, 0
    for n in (n_text + v for v in vision):
        q_and_o, k_and_v = 2 * (2 * n * WIDTH * WIDTH), 2 * (2 * n * WIDTH * head)
        total += q_and_o + k_and_v + 2 * (2 * n * n * WIDTH) + 3 * (2 * n * WIDTH * MLP)
    return total


TOKENS = {"dense": [16, 16, 16, 16], "pruned": [16, 16, 3, 3], "student": [0, 16, 5, 0]}


@pytest.mark.parametrize("key", SYSTEMS)
def test_flops_and_vision_tokens_equal_the_count_by_hand(run, naive, key):
    found = run[1]["systems"][key]
    lengths = [n_text for _, n_text in naive[key]]
    assert found["vision_tokens"]["per_layer"] == TOKENS[key]
    assert found["flops"]["mean"] == pytest.approx(np.mean([by_hand(n, TOKENS[key]) for n in lengths]))
    dense = np.mean([by_hand(n, TOKENS["dense"]) for n in lengths])
    assert found["flops"]["ratio"] == pytest.approx(found["flops"]["mean"] / dense)


@pytest.mark.parametrize("key", SYSTEMS)
def test_kv_bytes_equal_the_count_by_hand(run, naive, questions, key):
    lengths = [naive[key][i][1] for i in (0, len(questions) // 2)]  # the two prompts of the latency
    per_token = 2 * (WIDTH // HEADS) * 4  # one key and one value of one head, float32
    wanted = np.mean([sum(n + v for v in TOKENS[key]) * per_token for n in lengths])
    assert run[1]["systems"][key]["kv_bytes"]["mean"] == wanted


def test_a_view_in_the_cache_costs_what_it_keeps_alive():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    assert efficiency.kv_cache_bytes(cache) == 2 * 24 * 4
    cache.layers[0].keys = torch.zeros(1, 2, 100, 4)[:, :, :3]
    assert efficiency.kv_cache_bytes(cache) == 24 * 4 + 800 * 4


def test_peak_memory_is_the_highest_point_and_not_the_sum():
    kept = torch.zeros(1000)

    def work():
        a = torch.zeros(100_000)  # 400 kB
        b = a + 1  # 800 kB
        del a
        c = b.double()  # 400 + 800 kB
        del b
        return kept + c[:1000]

    assert efficiency.peak_bytes(work, torch.device("cpu")) == pytest.approx(1_200_000, rel=0.01)


def test_time_of_an_answer_separates_the_first_token(monkeypatch):
    clock = iter([0.0, 1.0, 8.0, 10.0, 12.0, 15.0])  # start, prompt, then four tokens
    monkeypatch.setattr(efficiency.time, "perf_counter", lambda: next(clock))

    def generate(model, inputs, new_tokens, *, streamer):
        for _ in range(1 + new_tokens):
            streamer.put(None)

    monkeypatch.setattr(efficiency, "_generate", generate)
    assert efficiency.time_answer(None, {}, 4) == (8.0, 2.0)


def test_rounds_are_interleaved_and_ratios_are_of_the_same_round(monkeypatch, student, processor):
    order, seconds = [], {None: 1.0, 3: 0.5}

    def timed(model, inputs, new_tokens):
        keep = student.attachment.policy.keep.get(2)
        order.append(keep)
        drift = 1.0 if len(order) <= 4 else 3.0  # the machine gets slower
        return drift * seconds[keep], drift

    monkeypatch.setattr(efficiency, "time_answer", timed)
    two = {key: SYSTEMS[key] for key in ("dense", "pruned")}
    prompts = [prompt_inputs(student.model, processor, [load_scenes("test", 1)[i]]) for i in (0, 1)]
    found = efficiency.measure(
        model=student.model.eval(),
        attachment=student.attachment,
        systems=two,
        prompts=prompts,
        reference="dense",
        repeats=2,
        new_tokens=2,
    )
    assert order == [None, 3, 3, None, 3, None, None, 3]
    assert found["pruned"].ttft.ratio == found["pruned"].ttft.ratio_q75 == 0.5
    assert found["dense"].ttft.median == 2.0 and found["dense"].tpot.ratio == 1.0


def test_images_are_encoded_once_for_all_systems_of_the_same_weights(student, processor):
    inputs = prompt_inputs(student.model, processor, [load_scenes("test", 1)[0]])
    with running(student.model.eval(), student.attachment, SYSTEMS["dense"]):
        encoded = encode_images(student.model, inputs)
        assert "pixel_values" not in encoded
        assert torch.equal(student.model(**inputs).logits, student.model(**encoded).logits)


class Page(HTMLParser):
    """Collects what a page refers to and which sections it has."""

    def __init__(self, text: str):
        super().__init__()
        self.refers, self.ids, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.refers += [values[name] for name in ("src", "href", "xlink:href", "data") if name in values]
        self.ids += [values["id"]] if "id" in values else []


def test_report_has_every_section_and_needs_no_network(run):
    folder, results = run
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert {"results", "figures", "examples", "next", "method"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == 3 and "img" in page.tags
    assert all(reference.startswith("data:image/png;base64,") for reference in page.refers)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    for system in results["systems"].values():
        assert system["name"] in text and f"{100 * system['accuracy']['overall']['value']:.1f}" in text
    assert results["environment"]["command"] in text.replace("&#39;", "'")
    assert len(text) < 400_000


def test_results_json_holds_every_number_and_says_where_it_comes_from(run):
    folder, results = run
    stored = json.loads((folder / "results.json").read_text())
    assert stored["schema"] == 1
    assert set(stored) == {
        "schema", "title", "note", "checkpoint", "roles", "data", "model", "systems", "paired", "settings",
        "environment",
    }  # fmt: skip
    for key, system in stored["systems"].items():
        assert set(system) == {
            "name", "policy", "adapters", "accuracy", "flops", "vision_tokens", "ttft", "tpot", "kv_bytes",
            "working_bytes",
        }  # fmt: skip
        assert set(system["accuracy"]["types"]) == set(stored["data"]["types"])
        assert (
            sum(score["n"] for score in system["accuracy"]["types"].values()) == stored["data"]["questions"]
        )
        assert system["working_bytes"]["mean"] > 0 and system["ttft"]["median"] > 0
        assert system["flops"]["mean"] == results["systems"][key]["flops"]["mean"]
    assert set(stored["paired"]) == {"dense", "pruned"}
    assert stored["systems"]["student"]["policy"]["keep"] == {"2": 5}
    assert {"torch", "transformers", "latefusion"} <= set(stored["environment"]["versions"])


def test_table_fits_a_terminal_of_80_columns_and_says_what_the_files_say(run):
    folder, _ = run
    stored = json.loads((folder / "results.json").read_text())
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    tables.print_table(stored, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    flat, markdown = " ".join(text.split()), tables.markdown(stored)
    for row in tables.rows(stored):
        for value, _ in row.cells:
            assert value in flat and value in markdown


def test_figure_for_the_readme_is_a_picture_of_its_own(run):
    drawing = ElementTree.fromstring(standalone(tokens_per_layer(run[1])))
    space = {"s": "http://www.w3.org/2000/svg"}
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    lines = drawing.findall("s:path[@class]", space)
    assert sum("line" in line.attrib["class"] for line in lines) == len(SYSTEMS)
    assert "--s0" in drawing.find("s:style", space).text


def test_readme_keeps_all_but_what_stands_between_the_marks():
    document = "before\n<!-- results -->\nold\n<!-- /results -->\nafter\n"
    assert insert(document, "results", "new") == "before\n<!-- results -->\nnew\n<!-- /results -->\nafter\n"
    with pytest.raises(ValueError, match="other"):
        insert(document, "other", "new")


def test_one_question_is_enough_for_a_report(student, processor, questions, tmp_path):
    results = evaluate_run(
        model=student.model,
        processor=processor,
        attachment=student.attachment,
        systems=SYSTEMS,
        dataset=questions.select([1]),  # nobody is right
        output_dir=tmp_path,
        title="one",
        latency_prompts=5,
        latency_repeats=1,
    )
    assert np.isnan(results["paired"]["dense"]["ratio"]["value"])
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["paired"]["dense"]["ratio"]["value"] is None
    assert stored["settings"]["latency_prompts"] == 1 and stored["data"]["split"] == "test"
    assert "examples" in Page((tmp_path / "report.html").read_text()).ids


def refused(student, processor, dataset, folder, **changes):
    values = {"systems": SYSTEMS, "dataset": dataset, "model": student.model} | changes
    with pytest.raises(ValueError) as error:
        evaluate_run(
            processor=processor, attachment=student.attachment, output_dir=folder, title="", **values
        )
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_input_is_one_sentence_before_any_compute(student, processor, questions, tmp_path):
    folder = tmp_path / "report"
    assert "column 'type'" in refused(student, processor, questions.remove_columns("type"), folder)
    assert "no question" in refused(student, processor, questions.select([]), folder)
    assert "'oracle'" in refused(student, processor, questions, folder, candidate="oracle")
    plain = tiny_model()
    attach(plain, VisionSchedule())
    assert "adapters" in refused(student, processor, questions, folder, model=plain)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["checkpoint=outputs/nowhere"], "outputs/nowhere"),
        (["checkpoint=."], "config.yaml"),
        (["split=test"], "checkpoint"),
        (["checkpont=outputs/late_fusion"], "checkpont"),
        (["samples=many", "checkpoint=x"], "many"),
        (["--help"], "split: of the questions"),
    ],
)
def test_command_line_says_what_is_wrong(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert says in str(error.value)
