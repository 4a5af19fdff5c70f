"""Options of `sparrow train` from preset, file and command line: which one counts, and that none is ignored."""

import pytest
import torch

from sparrow_hf import SparrowDraftConfig
from sparrow_hf.errors import TrainingOptionsError
from sparrow_hf.training.options import DRAFT_FIELDS, describe_options, parse_options

NEEDED = ["--target", "t", "--train", "rows.jsonl", "--output", "draft"]


def test_command_line_before_file_before_preset(tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text(
        "target: t\ntrain: rows.jsonl\noutput: draft\nlearning-rate: 1e-4\nnum_mtp_steps: 3\nuse_cpu: true\n"
    )
    options, arguments = parse_options(
        [
            *("--config", str(config), "--preset", "paper", "--num-mtp-steps", "4"),
            *("--feature-layers", "2", "-1", "--feature-norm", "false"),
        ]
    )
    assert options.target == "t" and arguments.output_dir == "draft/checkpoints"
    assert arguments.learning_rate == 1e-4 and arguments.use_cpu  # from the file; the preset has 3e-5
    assert arguments.mtp_attention == "reinput" and arguments.probability_l1_weight == 10.0  # preset
    layers = {"feature_layers": [2, -1], "feature_norm": False}
    assert options.draft_fields == {"num_mtp_steps": 4, "num_glimpse_tokens": 0} | layers


def test_dashes_and_underscores_are_one(tmp_path):
    for words in (["--learning-rate", "1e-3"], ["--learning_rate=1e-3"], ["--learning-rate=1e-3"]):
        assert parse_options([*NEEDED, "--use-cpu", *words])[1].learning_rate == 1e-3


def test_options_of_other_verbs_have_their_names_here_too(tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text("dtype: bfloat16\nprocessor: p\n")
    assert parse_options(NEEDED)[0].target_dtype == "auto"
    for words in (["--dtype", "bfloat16"], ["--dtype=bfloat16"], ["--config", str(config)]):
        assert parse_options([*NEEDED, *words])[0].target_dtype == "bfloat16"
    options = parse_options([*NEEDED, "--config", str(config), "--dtype", "float16"])[0]
    assert (options.target_dtype, options.processor, options.draft_dtype) == ("float16", "p", "float32")


def test_a_training_is_where_its_options_say():
    options, arguments = parse_options([*NEEDED, "--device", "cpu"])
    assert arguments.use_cpu and options.device_of(arguments) == arguments.device == torch.device("cpu")
    options, arguments = parse_options([*NEEDED, "--device", "auto"])
    assert options.device_of(arguments) == "auto"
    assert not parse_options(NEEDED)[1].use_cpu
    # There is no GPU here, and a second one is never chosen by its number.
    for device in ("meta", "cuda:1"):
        with pytest.raises(TrainingOptionsError, match=f"--device {device}: .* the first cpu .*CUDA_VISIBLE_DEVICES"):
            parse_options([*NEEDED, "--device", device])


def test_the_help_shows_what_a_new_draft_is():
    told = {name: (default, text) for options in describe_options().values() for name, default, text in options}
    configured = SparrowDraftConfig()
    for name in DRAFT_FIELDS:
        default, text = told[f"--{name.replace('_', '-')}"]
        # Of what depends on the target or on another option, the text alone says it.
        assert default == ("" if "default" in text else str(getattr(configured, name))), name
    assert told["--num-draft-levels"][0] == "7" and told["--glimpse-spacing"][0] == "even"
    assert "32,768 tokens" in told["--vocabulary"][1] and "at least 0.995 of" in told["--vocabulary"][1]
    assert told["--target"][0] == "required" and told["--held-out"][0] == ""


def test_a_preset_in_the_file_counts(tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text("preset: paper\n")
    options, arguments = parse_options([*NEEDED, "--config", str(config)])
    assert options.preset == "paper" and arguments.list_mle_weight == 0.1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "t"], "--train, --output"),
        ([*NEEDED, "--speed", "9"], "--speed"),
        ([*NEEDED, "--learning-rate", "fast"], "fast"),
        ([*NEEDED, "--preset", "papers"], "papers"),
        ([*NEEDED, "--lora", "8"], "--warm-start"),
        ([*NEEDED, "--warm-start", "d", "--num-mtp-steps", "2"], "num_mtp_steps"),
        ([*NEEDED, "--warm-start", "d", "--copy-last-layer"], "leave out --copy-last-layer"),
        ([*NEEDED, "--output-dir", "x"], "--output-dir x: checkpoints are always in draft/checkpoints"),
        ([*NEEDED, "--resume-from-checkpoint", "true"], "give --resume$"),
        ([*NEEDED, "--num-visual-rows-min", "9", "--num-visual-rows-max", "3"], "num_visual_rows"),
        ([*NEEDED, "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_makes_no_sense_is_refused(words, message):
    with pytest.raises(TrainingOptionsError, match=message):
        parse_options(words)


@pytest.mark.parametrize(
    "text",
    [
        *(b"colour: blue\n", b"optimiser:\n  lr: 1\n", b"- a\n- b\n", b"a: [\n", b"run_name: caf\xe9\n"),
        *(b"feature_layers: 14\n", b"feature_layers: [a]\n"),
    ],
)
def test_bad_files_are_refused(tmp_path, text):
    config = tmp_path / "recipe.yaml"
    config.write_bytes(text)
    with pytest.raises(TrainingOptionsError):
        parse_options([*NEEDED, "--config", str(config)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rate: yes", "learning_rate: YAML reads this value as true; if it is a word, such as"),
        ("lora: true", "lora: YAML reads this value as true"),
        (
            "save_strategy: no",
            'save_strategy: YAML reads this value as false; if it is a word, such as "no", quote it',
        ),
        ("held_out: on", "held_out: YAML reads this value as true"),
        ("max_steps: 4.5", "max.steps: invalid int value: '4.5'"),
        ("num_mtp_steps: two", "num.mtp.steps: invalid int value: 'two'"),
        ("feature_layers: [1.5]", "feature.layers: invalid int value: '1.5'"),
        ("bf16: maybe", "bf16: .*maybe"),
        ("seed:", "seed: there is no value; leave the line out"),
        ("train: [a, b]", r"train: a single value is needed, found the list \['a', 'b'\]"),
        ("preset: [paper]", "preset: a single value is needed"),
        ("glimpse_spacing: log", "glimpse.spacing: invalid choice: 'log'"),
        ("mtp_attention: Exact", "mtp.attention: invalid choice: 'Exact'"),
    ],
)
def test_a_value_that_yaml_reads_otherwise_is_refused_by_its_name(tmp_path, line, message):
    (tmp_path / "recipe.yaml").write_text(f"{line}\n")
    with pytest.raises(TrainingOptionsError, match=message):
        parse_options([*NEEDED, "--use-cpu", "--config", str(tmp_path / "recipe.yaml")])


def test_values_of_yaml_are_those_of_the_command_line(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "learning_rate: 1\nsave_steps: 20\nsave_strategy: 'no'\nstreaming: 'false'\ndry_run: yes\nbf16: no\nlora:\n"
        "report_to: none\nfeature_layers: [2, -1]\nvocabulary: 5\nmax_grad_norm: 1e-1\nsave_total_limit: null\n"
    )
    options, arguments = parse_options([*NEEDED, "--use-cpu", "--config", str(tmp_path / "recipe.yaml")])
    found = [options.streaming, options.dry_run, options.lora, options.feature_layers, options.vocabulary]
    assert found == [False, True, None, [2, -1], "5"]
    found = [arguments.learning_rate, arguments.save_steps, arguments.save_strategy, arguments.bf16]
    assert found == [1.0, 20, "no", False] and type(arguments.learning_rate) is float
    assert (arguments.max_grad_norm, arguments.save_total_limit, arguments.report_to) == (0.1, None, [])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--label-smoothing-factor 0.3", "label_smoothing_factor must stay 0.0, found 0.3: the losses compare with"),
        ("--neftune-noise-alpha 5", "neftune_noise_alpha must stay None, found 5.0: .*hidden_state_noise"),
        ("--batch-eval-metrics true", "batch_eval_metrics must stay False, found True: "),
        ("--eval-do-concat-batches false", "eval_do_concat_batches must stay True, found False: "),
        ("--include-num-input-tokens-seen true", "include_num_input_tokens_seen must stay no, found 'all': "),
        ("--include-for-metrics loss inputs", "include_for_metrics must not name 'inputs'"),
        ("--remove-unused-columns true", "remove_unused_columns must stay False, found True: "),
        (
            "--train-sampling-strategy group_by_length",
            "train_sampling_strategy must not be 'group_by_length': rows have",
        ),
    ],
)
def test_arguments_that_a_draft_has_no_use_for_are_refused(words, told):
    with pytest.raises(TrainingOptionsError, match=told):
        parse_options([*NEEDED, "--use-cpu", *words.split()])


@pytest.mark.parametrize(
    ("words", "evaluated"),
    [
        ("", ("no", None)),
        ("--held-out h", ("steps", 40)),
        ("--held-out h --save-strategy epoch", ("epoch", 40)),
        ("--held-out h --save-strategy best --metric-for-best-model tau", ("steps", 40)),
        ("--held-out h --load-best-model-at-end true", ("steps", 40)),
        ("--held-out h --eval-steps 20", ("steps", 20)),
        ("--held-out h --eval-strategy epoch", ("epoch", None)),
        ("--held-out h --eval-strategy no", ("no", None)),
        ("--output-dir draft/checkpoints --eval-strategy no", ("no", None)),
    ],
)
def test_held_out_rows_are_evaluated_where_checkpoints_are_saved_unless_it_is_said(words, evaluated):
    _, arguments = parse_options([*NEEDED, "--use-cpu", "--save-steps", "40", *words.split()])
    assert (arguments.eval_strategy, arguments.eval_steps) == evaluated
