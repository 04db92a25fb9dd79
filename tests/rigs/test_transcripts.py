"""Words of the docs that are typed: what a shell makes of them, and transcripts that are of these very words."""

import re

import pytest

from tests.support import typed_docs as typed

PAGES = ("ec2.md", "on-prem.md", "sagemaker.md")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_means_the_same_in_bash_and_zsh(page: str) -> None:
    """zsh does not split an unquoted variable, reads `$ME:r` as a modifier, and `#` at its prompt as a word."""
    script = typed.script(page)
    assert "#" not in script and not re.search(r"\$\w+:", script)
    for line in script.replace("\\\n", " ").splitlines():
        bare = re.sub(r'"[^"]*"|\'[^\']*\'', "", line)
        assert "$" not in re.sub(r"^\w+=\S*", "", bare), line


@pytest.mark.parametrize("page", PAGES)
def test_a_transcript_is_of_the_page_as_it_stands(page: str) -> None:
    """Every command stands in it, or what is typed instead; `RAYTRAIN_BRATS_TRANSCRIPTS=docs/transcripts` with
    tests/rigs/test_rig.py and tests/rigs/test_sagemaker_docs.py writes them anew."""
    text = (typed.PAGES / "transcripts" / page.replace(".md", ".txt")).read_text()
    for command in typed.commands(page):
        instead, _ = typed.INSTEAD.get(command, (command, ""))
        assert f"\n{typed.prompted(instead)}\n" in text, command


def test_a_background_tunnel_does_not_hold_the_terminal() -> None:
    """A shell stops what reads its terminal from the background: the tunnel of `ray dashboard` would hang, unseen."""
    for page in (*PAGES, "monitoring.md"):
        for command in typed.commands(page):
            assert not command.endswith("&") or command.endswith("< /dev/null &"), command
