"""What is pasted into scripts comes out of bash and of sbatch as it went in."""

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.config import ConfigError, build_config
from runtime.program import UserError
from slurm.config import ClusterConfig, parse_time_limit
from slurm.jobs import CHECKOUT
from slurm.quoting import directive, log_pattern, quote_all
from slurm.submit import main

AWKWARD = "a b'c\"d#e$(f)`g`;h&i|j*k~l!m%n{o}[p]<q>é"
PRINTABLE = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=30)


def split_directive(line: str) -> list[str]:
    """Splits an `#SBATCH` line as Slurm's src/sbatch/opt.c does: blanks, two quotes, backslash anywhere, `#`."""
    assert line.startswith("#SBATCH")
    words, word, inside, escaped = [], None, "", False
    for letter in line.removeprefix("#SBATCH"):
        if escaped:
            word, escaped = (word or "") + letter, False
        elif letter == "\\":
            escaped = True
        elif inside:
            if letter == inside:
                inside = ""
            else:
                word = (word or "") + letter
        elif letter in "'\"":
            inside, word = letter, word or ""
        elif letter == "#":
            break
        elif letter.isspace():
            if word is not None:
                words.append(word)
            word = None
        else:
            word = (word or "") + letter
    assert not inside and not escaped, "sbatch ends with an unmatched quote"
    return words if word is None else [*words, word]


@given(text=PRINTABLE)
def test_a_directive_is_one_option(text: str) -> None:
    option = f"--job-name={text}"
    if "\\" in text:
        with pytest.raises(UserError, match="backslash"):
            directive(option)
    else:
        assert split_directive(directive(option)) == [option]


def test_without_quotes_the_same_option_is_another() -> None:
    assert split_directive("#SBATCH --job-name=a b#c") == ["--job-name=a", "b"]


def test_words_reach_a_program_of_bash_as_they_are() -> None:
    words = [AWKWARD, "back\\slash", "", "-n", "$HOME"]
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {quote_all(words)}"], capture_output=True, check=True
    )
    assert done.stdout.decode().split("\0")[:-1] == words


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\0b", "a\tb"])
def test_control_characters_are_refused(text: str) -> None:
    for function in (directive, lambda word: quote_all([word])):
        with pytest.raises(UserError, match="control character"):
            function(text)


def test_an_awkward_run_name_stays_one_word_everywhere(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(CHECKOUT)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr("slurm.submit.scheduler_answers", lambda: False)
    shards = tmp_path / "a shard's #1 100%"
    shards.mkdir()
    (shards / "manifest.json").write_text('{"schema": 1, "splits": {"train": {}, "test": {}}}')
    config = "configs/pretrain_vit-mini_fashion-mnist_full.yaml"
    name = AWKWARD.replace("{o}", "o").replace("[p]", "p")  # which YAML would read
    place = [f"data.shards='{str(shards).replace(chr(39), 2 * chr(39))}'", f"run.output_dir={tmp_path}/50%"]
    assert (
        main([config, *place, "run.name='" + name.replace("'", "''") + "'", "--evaluate", "knn", "--dry-run"])
        == 0
    )
    scripts = capsys.readouterr().out
    directives = [split_directive(line) for line in scripts.splitlines() if line.startswith("#SBATCH")]
    assert all(len(words) == 1 and words[0].startswith("--") for words in directives)
    assert [f"--job-name={name}"] in directives
    assert [f"--output={tmp_path}/50%%/{name.replace('%', '%%')}/slurm/dry-run/%j.log"] in directives
    # The block that names the run, executed: `cd` goes there and `set --` has one argument.
    block = next(line for line in scripts.splitlines() if line.startswith("set -- "))
    done = subprocess.run(
        ["bash", "-c", f"{block}\nprintf '%s\\n' $# \"$1\""], capture_output=True, text=True
    )
    assert done.stdout == f"1\n{tmp_path}/50%/{name}/slurm/dry-run/{name}.yaml\n"


def test_per_cent_signs_of_a_folder_are_no_patterns(tmp_path) -> None:
    assert log_pattern(tmp_path / "50%j", "%A_%a.log") == f"{tmp_path}/50%%j/%A_%a.log"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:00:00", 3600),
        ("2-0", 172800),
        ("2-1:30", 178200),
        ("1-00:00:01", 86401),
        ("0", 0),
        ("infinite", float("inf")),
        ("UNLIMITED", float("inf")),
        ("", None),
        ("n/a", None),
        ("1:2:3:4", None),
        ("-5", None),
        ("1d", None),
        ("٣", None),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: float | None) -> None:
    assert parse_time_limit(text) == seconds


@pytest.mark.parametrize(
    "wrong",
    [
        {"sbatch_options": ["--mail-type END"]},
        {"sbatch_options": ["#SBATCH"]},
        {"srun_options": ["x"]},
        {"account": "a b"},
        {"qos": "a'b"},
        {"memory_per_cpu": "4 G"},
        {"memory_per_cpu": "0"},
        {"environment": {"A B": "x"}},
        {"time": "UNLIMITED"},
        {"warn_before_end_s": 90000},
        {"setup": ["a\nb"]},
    ],
)
def test_a_description_that_sbatch_would_misread_is_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(wrong))}.* is .*; expected .*; set "):
        build_config(ClusterConfig, wrong)
