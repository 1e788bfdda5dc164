"""What `--help` says: each verb and option begins with an imperative and says its default; the examples are commands.

Shells complete verbs, options and file names (docs/how-to/shell-completion.md).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from p3d.jobs.cli import STORES, VERBS, Verb, Verbs, cli, output
from tests.conftest import P3D, REPO

# with what the help of a verb or an option may begin; add a verb here if it is the plain one for what is done
IMPERATIVES = frozenset(
    """Abandon Accept Build Change Check Choose Compute Continue Convert Copy Count Cut Decay Decode Divide
    Download Draw Drop Embed Encrypt Estimate Exit Fail Find Freeze Give Hold Initialise Join Keep Lay Leave Let
    List Listen Load Look Measure Mirror Multiply Name Open Optimise Pay Pool Print Put Rank Read Record Refuse
    Repair Require Resample Retry Return Run Search Seed Set Show Skip Start Stop Store Take Test Time Train Trust
    Try Turn Use Verify Wait Write""".split()
)
SAYS_A_DEFAULT = re.compile(r"\bDefault: |\[default: |\[required\]|[;,] default: ")


def walked(command: click.Command = cli, context: click.Context | None = None) -> Iterator[click.Context]:
    """A context for each command, groups included."""
    context = context or click.Context(cli, info_name="p3d", terminal_width=100)
    yield context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from walked(found, click.Context(found, info_name=name, parent=context, terminal_width=100))


CONTEXTS = {context.command_path: context for context in walked()}


def records(context: click.Context) -> Iterator[tuple[click.Option, str]]:
    """Each option of a command with its help."""
    for param in context.command.get_params(context):
        if isinstance(param, click.Option) and (record := param.get_help_record(context)) is not None:
            yield param, record[1]


def lines(verbs: Verbs) -> Iterator[str]:
    """The line of every verb in the table of its group."""
    for where, line in verbs.values():
        yield line
        if not isinstance(where, str):
            yield from lines(where)


def texts_of(context: click.Context) -> list[str]:
    """The help of a command and those of its options."""
    return [str(context.command.help), *(text for _, text in records(context))]


def first_word(text: str) -> str:
    return re.split(r"\W", text, maxsplit=1)[0]


@pytest.mark.parametrize("path", CONTEXTS)
def test_help_begins_with_an_imperative(path: str) -> None:
    """The help of a verb and of each of its options does."""
    assert not [text for text in texts_of(CONTEXTS[path]) if first_word(text) not in IMPERATIVES]


def test_the_tables_of_verbs_begin_with_an_imperative() -> None:
    """Each line of `p3d --help` and of the helps of groups does, and no word of the list is unused."""
    assert not [line for line in lines(VERBS) if first_word(line) not in IMPERATIVES]
    used = {first_word(text) for context in CONTEXTS.values() for text in texts_of(context)}
    assert used | {first_word(line) for line in lines(VERBS)} >= IMPERATIVES


@pytest.mark.parametrize("path", CONTEXTS)
def test_an_option_with_a_value_says_its_default(path: str) -> None:
    """Or that it is required. A flag is off by default; one of a pair, such as --flip, says which is taken."""
    options = [(param, text) for param, text in records(CONTEXTS[path]) if not param.is_flag or param.secondary_opts]
    assert not [param.opts[0] for param, text in options if not SAYS_A_DEFAULT.search(text)]


@pytest.mark.parametrize("path", CONTEXTS)
def test_many_options_are_grouped(path: str) -> None:
    """A verb with more than twelve options, without those of S3, has headings; at most ten options have none."""
    groups = [group for param, _ in records(CONTEXTS[path]) if (group := getattr(param, "group", "")) != STORES]
    assert len(groups) <= 12 or groups.count("") <= 10


@pytest.mark.parametrize("path", [path for path, context in CONTEXTS.items() if isinstance(context.command, Verb)])
def test_every_verb_can_be_verbose_and_quiet(path: str) -> None:
    flags = [flag for param, _ in records(CONTEXTS[path]) for flag in param.opts]
    assert {"-v", "--verbose", "-q", "--quiet"} <= set(flags) and len(set(flags)) == len(flags)


def parsed(words: list[str]) -> click.Context:
    """Parse a command line as `p3d` does, without running its verb."""
    context, command, rest = CONTEXTS["p3d"], cli, words
    while isinstance(command, click.Group):
        _, command, rest = command.resolve_command(context, rest)
        assert command is not None
        context = click.Context(command, info_name=command.name, parent=context)
    return command.make_context(str(command.name), list(rest), parent=context.parent)


EXAMPLES = [
    (path, line)
    for path, context in CONTEXTS.items()
    for line in re.findall(r"^ +(p3d \w.*)$", str(context.command.help), re.M)
]


@pytest.mark.parametrize(("path", "line"), EXAMPLES)
def test_every_example_is_a_command(path: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of a help that begin with `p3d` fit 80 columns, and parse where their files exist."""
    assert len(line) <= 76
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output, "be_quiet", lambda: None)  # it would last: nothing ends this command
    for name in ("resnet50.pth", "ids.txt"):
        Path(name).touch()
    assert parsed(shlex.split(line, comments=True)[1:]).params


def test_the_helps_have_examples() -> None:
    """Those of `p3d` and of the verbs with the most options."""
    verbs = {"p3d", "p3d launch", "p3d plan", "p3d retry", "p3d search", "p3d train", "p3d verify", "p3d weights fetch"}
    assert verbs <= {path for path, _ in EXAMPLES}


NAMED = [
    (path, quoted)
    for path, context in CONTEXTS.items()
    for text in texts_of(context)
    for quoted in re.findall(r"`(p3d [^`]+)`", text)
]


@pytest.mark.parametrize(("path", "quoted"), sorted(set(NAMED)))
def test_every_command_that_a_help_names_exists(path: str, quoted: str) -> None:
    """So do its options."""
    words = quoted.split()[1:]
    verb = next(
        (context for at in (2, 1) if (context := CONTEXTS.get(" ".join(["p3d", *words[:at]])))),
        None,
    )
    assert verb is not None, quoted
    flags = {flag for param, _ in records(verb) for flag in [*param.opts, *param.secondary_opts]}
    assert {word for word in words if word.startswith("-")} <= flags


def completed(words: str) -> list[str]:
    """What bash offers after `words`, the last of which is completed, as `type,text`."""
    parts = words.split(" ")
    asked = {"_P3D_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(parts) - 1)}
    code = P3D[-1].replace("main()", "sys.argv[0] = 'p3d'; main()")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}"],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("p3d lau", ["plain,launch"]),
        ("p3d results s", ["plain,serve", "plain,snapshot"]),
        ("p3d search out q.mp4 --to", ["plain,--top"]),
        ("p3d launch --decoder p", ["plain,pyav"]),
        ("p3d launch vid", ["file,vid"]),
        ("p3d launch --weights p", ["file,p"]),
    ],
)
def test_shells_complete_commands(words: str, offered: list[str]) -> None:
    """Verbs, options and their choices, and the names of files."""
    assert completed(words) == offered


def test_the_page_teaches_a_real_bash(tmp_path: Path) -> None:
    """After the lines of docs/how-to/shell-completion.md a shell completes `p3d lau`, also from the file."""
    page = (REPO / "docs" / "how-to" / "shell-completion.md").read_text()
    script = tmp_path / "p3d"
    script.write_text(f"#!{sys.executable}\nfrom p3d.jobs.cli import main\nmain()\n")
    script.chmod(0o755)
    env = {**os.environ, "HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.S | re.M)
    assert len(blocks) == 2
    for block in blocks:
        shell = f"{block}\n[ -e ~/.bashrc ] && . ~/.bashrc\nCOMP_WORDS=(p3d lau) COMP_CWORD=1\n_p3d_completion p3d"
        done = subprocess.run(
            ["bash", "-c", f'{shell}\necho "${{COMPREPLY[@]}}"'], env=env, capture_output=True, text=True, check=True
        )
        assert (done.stdout, done.stderr) == ("launch\n", "")


def test_no_verb_is_imported_to_complete_a_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of verbs has their lines of help, so that the key answers at once."""
    imported = [name for name in sys.modules if name.startswith("p3d.jobs.cli.")]
    code = "from p3d.jobs.cli import cli; import click, sys; cli.shell_complete(click.Context(cli), 'l')"
    code += "; print([name for name in sys.modules if name.startswith('p3d.jobs.cli.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, bool(imported)) == ("[]\n", True)
