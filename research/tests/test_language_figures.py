"""The figures of the English-writing target in docs/language.md and README.md are those that are kept."""

import json
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from safetensors.torch import load_file

from sparrow_hf import SparrowDraftModel
from sparrow_research.language import video_figure
from sparrow_research.language.text import tables, write_report

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "research/data/language"
PAGE = "\n".join((REPOSITORY / f"docs/{name}.md").read_text() for name in ("language", "language-video"))
README = " ".join((REPOSITORY / "README.md").read_text().split())
KINDS = ("number", "colour", "shape", "size", "background", "motion", "dot", "corner")


def kept() -> dict[str, Any]:
    return json.loads((DATA / "video.json").read_text())


def share(value: float) -> str:
    return f"{value:.2f}" if round(value, 2) >= 1 else f"{value:.2f}".removeprefix("0")


def test_what_it_sees() -> None:
    every = [share(row["right"]["all"]) for row in kept()["check"]]
    assert "right: {}, {}, {} and {} at 400, 3,000, 13,000 and 25,000 visual tokens".format(*every) in README
    for row in kept()["check"]:
        right, counts = row["right"], f"{row['clips']}, {row['questions']}"
        shares = [f"**{share(right['all'])}**", share(row["blind"]["all"]), *(share(right[kind]) for kind in KINDS)]
        assert f"| {row['visual_tokens']:,} | {row['rows']:,} | {counts} | {' | '.join(shares)} |" in PAGE


def test_what_drafts_accept_while_they_are_trained() -> None:
    text = json.loads((DATA / "tokens.json").read_text())["h200_steps_of_64"]["drafts"]
    drafts = {f"`{name}`": each for name, each in kept()["drafts"].items()}
    drafts["`eagle`, 963,186"] = text.pop("eagle")
    drafts |= {f"`sparrow`, {int(name.rpartition('-')[2]):,}": each for name, each in text.items()}
    for name, evaluations in drafts.items():
        taus = {each["step"]: f"{each['eval_tau']:.3f}" for each in evaluations}
        told = f"| {' | '.join(taus.get(step, '') for step in (75, 150, 225, 300))} |"
        assert any(line.startswith(f"| {name} |") and line.endswith(told) for line in PAGE.splitlines())


def test_rivals_on_text() -> None:
    rivals = json.loads((DATA / "tokens.json").read_text())["rivals_200_steps"]["drafts"]
    seeds = {name: rivals.pop(name) for name in list(rivals) if name.endswith("-seed1")}
    assert {"sparrow", "four-layers", "eagle3", "hivis", "paper", "one-pass", "eagle", "text-only"} <= set(rivals)
    for name, evaluations in rivals.items():
        last = evaluations[-1]
        assert last["step"] == 200
        accepted = " ".join(f"{last[f'eval_accepted_{token}']:.3f}".removeprefix("0") for token in (1, 2, 3))
        line = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}`") and accepted in line)
        again = f"{seeds[f'{name}-seed1'][-1]['eval_tau']:.3f} " if f"{name}-seed1" in seeds else " "
        assert f"| {accepted} | {last['eval_tau']:.3f} | {again}|" in line
    after_100 = next(each["eval_tau"] for each in rivals["sparrow"] if each["step"] == 100)
    ours, one = (rivals[name][-1]["eval_tau"] for name in ("sparrow", "one-pass"))
    told = f"{one:.3f} after 200 steps, while three passes have {after_100:.3f} after 100"
    assert told in " ".join(PAGE.split()) and f"{ours - one:.3f}".removeprefix("0") in PAGE


def test_four_layers_on_videos() -> None:
    for name, evaluations in kept()["rivals_100_steps"]["drafts"].items():
        taus = [f"{each['eval_tau']:.3f}" for each in evaluations] + [""] * (4 - len(evaluations))
        last = " ".join(f"{evaluations[-1][f'eval_accepted_{token}']:.3f}".removeprefix("0") for token in (1, 2, 3))
        line = f"| {last} | {' | '.join(taus)} |"
        assert any(each.startswith(f"| `{name}` |") and each.endswith(line) for each in PAGE.splitlines())
    none, few, default = (
        kept()["rivals_100_steps"]["drafts"][name][-1]["eval_tau"]
        for name in ("no-visual", "glimpse-16", "four-layers")
    )
    assert f"{none:.3f} with none, {few:.3f} with 16 visual rows, {default:.3f} with 64" in " ".join(PAGE.split())


def test_tau_over_answer_tokens_on_videos() -> None:
    about, last = kept()["tokens_100_steps"], "160,832"
    names = {"seed 1": f"{last}, seed 1", "seed 2": f"{last}, seed 2", "four-passes": f"{last}, seed 1, four passes"}
    rows = about["drafts"] | {label: about["seeds"][name] for name, label in names.items()}
    told = sorted(rows[label][-1]["eval_tau"] for label in (last, names["seed 1"], names["seed 2"]))
    assert "at {:.3f}, {:.3f} and {:.3f}".format(*told) in PAGE
    for tokens, evaluations in rows.items():
        taus = " | ".join(f"{each['eval_tau']:.3f}" for each in evaluations)
        accepted = " ".join(
            f"{evaluations[-1][f'eval_accepted_{token}']:.3f}".removeprefix("0") for token in (1, 2, 3)
        )
        lines = [line for line in PAGE.splitlines() if line.startswith(f"| {tokens} |")]
        assert any(line.endswith(f"| {accepted} | {taus} |") for line in lines)


def test_decoded_rivals() -> None:
    text = json.loads((DATA / "tokens.json").read_text())["rivals_200_steps"]["decoded"]
    for decoded in (text, kept()["rivals_100_steps"]["decoded"]):
        drafts = [row for row in decoded["rows"] if row["arm"] != "plain"]
        assert all(row["identical"] == row["prompts"] for row in drafts)
        arms = {(row["temperature"], *row["arm"].removeprefix("draft:").split("@")): row for row in drafts}
        for name in dict.fromkeys(name for _, name, _ in arms):
            cells = [
                f"{arms[temperature, name, tree]['tau']:.2f} | {arms[temperature, name, tree]['dsr']:.2f}"
                for temperature in (0.0, 1.0)
                for tree in ("chain-5", "30-4-8")
            ]
            assert any(each == f"| `{name}` | {' | '.join(cells)} |" for each in PAGE.splitlines())


def test_rivals_and_variants() -> None:
    rivals = kept()["rivals"]
    for name, evaluations in rivals["drafts"].items():
        last = evaluations[-1]
        accepted = " ".join(f"{last[f'eval_accepted_{token}']:.3f}".removeprefix("0") for token in (1, 2, 3))
        measured = rivals["lengths"]["drafts"].get(name, {"lengths": []})["lengths"]
        taus = [f"{row['tau']:.2f}" for row in measured] or [""] * 3
        line = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |") and accepted in line)
        assert line.endswith(f"| {accepted} | {last['eval_tau']:.3f} | {' | '.join(taus)} |")
    longer = {each["step"]: each["eval_tau"] for each in rivals["longer"]["drafts"]["sparrow"]}
    assert f"{longer[36]:.3f} after 36 steps and\n  {longer[75]:.3f} at the end" in PAGE
    shares = {
        length: [drafts["retention"][length]["ratio"] for drafts in rivals["lengths"]["drafts"].values()]
        for length in ("3000", "13000")
    }
    told = [f"{min(each[:-1]):.2f} to {max(each[:-1]):.2f}" for each in shares.values()]
    assert "keeps {} of its τ at 3,000 visual tokens and {} at 13,000".format(*told) in " ".join(PAGE.split())
    assert f"`text-only` {shares['3000'][-1]:.2f} and {share(shares['13000'][-1])}" in PAGE
    blind, ours = (rivals["drafts"][name][-1]["eval_tau"] for name in ("text-only", "sparrow"))
    assert f"held-out τ {blind:.2f} against {ours:.2f} at a smaller, equal budget" in README


def test_lengths_and_decoded_answers() -> None:
    drafts = kept()["lengths"]["drafts"]
    for ours, other in zip(drafts["sparrow"]["lengths"], drafts["no-visual"]["lengths"], strict=True):
        low, high = ours["tau_interval"]
        start = f"| {ours['visual_tokens']:,} | {ours['clips']} | {ours['tau']:.2f} | {low:.2f} … {high:.2f} |"
        assert any(line.startswith(start) and f"| {other['tau']:.2f} |" in line for line in PAGE.splitlines())
    taus = [f"{row['tau']:.2f}" for row in drafts["sparrow"]["lengths"]]
    assert (
        f"| chain of 3, teacher-forced, an earlier draft | 400, 3,000, 13,000, 25,000 | | {', '.join(taus)} | |"
        in README
    )
    for name in ("sparrow", "no-visual"):
        for length, kept_share in drafts[name]["retention"].items():
            low, high = kept_share["interval"]
            line = next(
                line for line in PAGE.splitlines() if line.startswith(f"| {int(length):,} | {kept_share['clips']}")
            )
            assert f"| {kept_share['ratio']:.2f} ({low:.2f} … {high:.2f}) |" in line
    for row in kept()["decoded"]["rows"][1:]:
        assert row["identical"] == row["prompts"]
        shares = " ".join(share(each) for each in row["per_position"])
        assert f"| {row['tau']:.2f} | " in PAGE and f"| {shares} | {row['dsr']:.2f} |" in PAGE


def test_the_draft_that_is_kept() -> None:
    about = kept()["draft"]
    ours, (earlier,) = about["evaluations"]["four-layers"], about["evaluations"]["last-layer"]
    accepted = [
        " ".join(f"{last[f'eval_accepted_{token}']:.3f}".removeprefix("0") for token in (1, 2, 3))
        for last in (ours[-1], earlier)
    ]
    taus = " | ".join(f"{each['eval_tau']:.3f}" for each in ours)
    assert f"| `four-layers`, kept | 2, 15, 27, last | {accepted[0]} | {taus} |" in PAGE
    assert f"| `last-layer`, kept before | last | {accepted[1]} |  |  |  | {earlier['eval_tau']:.3f} |" in PAGE
    assert f"τ {ours[-1]['eval_tau']:.2f} against {earlier['eval_tau']:.2f}, equal budget" in README
    taus = [f"{row['tau']:.2f}" for row in about["lengths"]["drafts"]["four-layers"]["lengths"]]
    assert f"| chain of 3, teacher-forced | 400, 3,000, 13,000, 25,000 | | {', '.join(taus)} | |" in README
    for name, draft in about["lengths"]["drafts"].items():
        taus = " | ".join(f"{row['tau']:.2f}" for row in draft["lengths"])
        shares = (draft["retention"][length] for length in ("3000", "13000", "25000"))
        kept_shares = (
            f"{each['ratio']:.2f} ({each['interval'][0]:.2f} … {each['interval'][1]:.2f})" for each in shares
        )
        figures = f"| {taus} | {' | '.join(kept_shares)} |"
        lines = [line for line in PAGE.splitlines() if line.startswith(f"| `{name.removesuffix('-100')}` |")]
        assert any(line.endswith(figures) for line in lines)
    told = []
    for row in about["decoded"]["rows"]:
        name = row["arm"].removeprefix("draft:sparrow@")
        # Prompt lookup draws other numbers when it samples.
        assert row["identical"] == row["prompts"] == 10 or (name, row["temperature"]) == ("prompt-lookup", 1.0)
        if name in ("plain", "none"):
            continue
        (low, high), (slow, fast) = row["tau_interval"], row["dsr_quartiles"]
        shares = " ".join(share(each) for each in row["per_position"])
        figures = f"{row['tau']:.2f} | {low:.2f} … {high:.2f} | {shares} | {row['dsr']:.2f} | {slow:.2f} … {fast:.2f}"
        assert f"| {row['temperature']:g} | {name} | {figures} |" in PAGE
        told.append(f"384 | 10 of 10 | {row['tau']:.2f} | {row['dsr']:.2f}× |")
    _, chain, tree, _, sampled, _ = told
    assert f"| chain of 3 | {chain} | 30-4-8 | {tree} | chain of 3, sampled at T = 1 | {sampled}" in README


def test_the_picture_of_lengths(tmp_path: Path) -> None:
    assert set(video_figure.CURVES) == set(kept()["draft"]["lengths"]["drafts"])
    video_figure.main(["--output", str(tmp_path / "lengths.png")])
    assert (tmp_path / "lengths.png").stat().st_size > 10_000
    assert "](figures/language-video.png)" in PAGE and video_figure.OUTPUT.is_file()


def test_sampled_answers() -> None:
    for row in kept()["sampled"]["rows"]:
        assert row["identical"] == row["prompts"] == 8
        name = row["arm"].removeprefix("draft:sparrow@")
        if row["temperature"] == 1 and name != row["arm"]:
            low, high = row["tau_interval"]
            slow, fast = row["dsr_quartiles"]
            shares = " ".join(share(each) for each in row["per_position"])
            figures = (
                f"{row['tau']:.2f} | {low:.2f} … {high:.2f} | {shares} | {row['dsr']:.2f} | {slow:.2f} … {fast:.2f}"
            )
            assert f"| {name} | {figures} |" in PAGE


def test_the_draft_for_text_that_is_kept() -> None:
    drafts = json.loads((DATA / "tokens.json").read_text())["four_layers_300_steps"]["drafts"]
    ours, (earlier,) = drafts["four-layers"], drafts["last-layer"]
    for name, evaluations, last in (
        ("`four-layers`, kept | 2, 15, 27, last | 300 × 32", ours, ours[-1]),
        ("`last-layer`, kept before | last | 300 × 64", [earlier], earlier),
    ):
        accepted = " ".join(f"{last[f'eval_accepted_{token}']:.3f}".removeprefix("0") for token in (1, 2, 3))
        taus = {each["step"]: f"{each['eval_tau']:.3f}" for each in evaluations}
        told = " | ".join(taus.get(step, "") for step in (50, 100, 150, 200, 250, 300))
        assert f"| {name} | {accepted} | {told} |" in PAGE
    gain = ours[-1]["eval_tau"] - earlier["eval_tau"]
    assert f"ahead by {share(gain)}, with half the rows" in PAGE and ours[2]["eval_tau"] > earlier["eval_tau"]
    rows = json.loads((DATA / "text.json").read_text())["last_layer"]["rows"]
    taus = [
        [f"{row['tau']:.2f}" for row in rows if row["temperature"] == temperature and "draft:sparrow" in row["arm"]]
        for temperature in (0, 1)
    ]
    assert "it has {}, {} and {} greedily, {}, {} and {} sampled".format(*taus[0], *taus[1]) in PAGE


def test_the_tables_of_text_are_written_into_their_place(tmp_path: Path) -> None:
    page = copyfile(REPOSITORY / "docs/language.md", tmp_path / "language.md")
    write_report(json.loads((DATA / "text.json").read_text()), page)
    assert page.read_text() == (REPOSITORY / "docs/language.md").read_text()


def test_decoded_text() -> None:
    found = json.loads((DATA / "text.json").read_text())
    assert all(line in PAGE.splitlines() for line in tables(found).splitlines())
    taus = {(row["temperature"], row["arm"]): f"{row['tau']:.2f}" for row in found["rows"]}
    greedy, sampled = (
        [taus[temperature, f"draft:sparrow@{tree}"] for tree in ("chain-3", "chain-5", "30-4-8")]
        for temperature in (0.0, 1.0)
    )
    text = " ".join(PAGE.split())
    assert "τ {} with chains of 3, {} with chains of 5 and **{} with the tree 30-4-8**".format(*greedy) in text
    assert "where several tokens are right and one is drawn, {}, {} and {}.".format(*sampled) in text
    (chain,) = (row for row in found["rows"] if (row["temperature"], row["arm"]) == (0, "draft:sparrow@chain-3"))
    assert "Chains of 3 are {:.2f} times as fast".format(chain["dsr"]) in text
    assert "(quartiles {:.2f} … {:.2f})".format(*chain["dsr_quartiles"]) in text
    assert f"{chain['tau']:.2f} with chains of 3, {chain['dsr']:.2f} times as fast as plain" in README
    tuned, costs = found["tuned"], found["tuned"]["costs"]["all frames"]["verify_ms"]
    ratios = [f"{tuned['speed_up'][f'chain-{depth}']:.2f}" for depth in (3, 2, 4)]
    assert tuned["shape"] == "chain-3"
    assert "chains of 3, {} times as fast as plain (chains of 2: {}, of 4: {})".format(*ratios) in text
    rows = [f"{costs[shape] / costs['none']:.1f}" for shape in ("chain-2", "chain-5")]
    assert "three rows takes {} times as long as over one, over six {} ".format(*rows) in text
    plain, reduced, full = found["vocabulary"]["rows"]
    assert (plain["arm"], reduced["arm"], full["arm"]) == ("plain", "8192", "49152")
    assert all(row["identical"] == 10 for row in (reduced, full)) and f"{reduced['tau']:.2f}" == f"{full['tau']:.2f}"
    told = f"drafting takes {full['draft_ms']:.0f} ms a round instead of {reduced['draft_ms']:.0f}"
    assert f"{told}: {full['dsr']:.2f} times as fast as plain, and not {reduced['dsr']:.2f} " in text


def test_the_kept_parts_load() -> None:
    for folder in ("draft", "video/draft"):
        draft = SparrowDraftModel.from_pretrained(DATA / folder)
        assert draft.config.target_num_hidden_layers == 30 and draft.config.hidden_size == 576
    for name in ("adapters", "tower"):
        about = json.loads((DATA / f"video/{name}.json").read_text())
        assert "Apache-2.0" in about["license"]
        assert {part.dtype for part in load_file(DATA / f"video/{name}.safetensors").values()} == {torch.bfloat16}
