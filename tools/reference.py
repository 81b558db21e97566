"""Write what is told from the code: pages of `docs/reference`, the dashboard, and rules for alerts.

Without an argument it writes them; with `verify` it says which of them are out of date.
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc

from peculium_server.cli.verbs import app
from peculium_server.config import CLIENT_SETTINGS, SERVER_SETTINGS, Setting
from peculium_server.core.refusals import RULES, Refusal
from peculium_server.rpc.status import CODES, OF_ONE_CALLER

ROOT = Path(__file__).resolve().parent.parent
TYPES = "peculium/v1/types.proto"
_ENUM_PATH, _VALUE_PATH = 5, 2
"""Where a FileDescriptorProto has its enums, and an EnumDescriptorProto its values."""


class Reason(NamedTuple):
    """A member of one of the wire's enums of reasons, with its comment."""

    name: str
    number: int
    text: str
    example: dict[str, str]


def pages() -> dict[Path, str]:
    """Every generated page, by its path in the repository."""
    from tools import metrics  # noqa: PLC0415 - a script finds its neighbours only once `main` has begun

    folder = Path("docs") / "reference"
    return {
        folder / "refusals.md": refusals_page(),
        folder / "configuration.md": configuration_page(),
        folder / "cli.md": cli_page(),
        folder / "metrics.md": metrics.metrics_page(),
        Path("deploy/grafana/peculium.json"): metrics.dashboard(),
        Path("deploy/prometheus/alerts.yaml"): metrics.alerts(),
    }


def refusals_page() -> str:
    """The page of all reasons, in order of precedence."""
    lines = [
        "# Refusals",
        "",
        "Why the ledger says no, in order of precedence: if several reasons apply, the first one is",
        "the answer. A refusal has changed nothing: no token is consumed, no balance moved.",
        "",
        "Alone, a refused operation ends with the gRPC code below and a `google.rpc.ErrorInfo` of the",
        "domain `peculium`, whose `reason` is the name and whose `metadata` are the facts; an operation",
        "of a `Batch` has the same in its `OperationResult.refused`. Facts may be added, and are never",
        "taken away. *Later* says whether the same request could succeed at another time.",
        "",
        "<!-- Written by tools/reference.py from proto/peculium/v1/types.proto and the server's tables. -->",
        "",
        "| | reason | gRPC code | later |",
        "|---|---|---|---|",
    ]
    refusals = list(reasons("RefusalReason", "REFUSAL_REASON_"))
    for reason in refusals:
        refusal = Refusal(reason.number)
        later = "yes" if RULES[refusal].transient else "no"
        anchor = f"[{reason.name}](#{reason.name.lower()})"
        lines.append(f"| {reason.number} | {anchor} | {CODES[refusal].name} | {later} |")
    for reason in refusals:
        lines += _section(reason, RULES[Refusal(reason.number)].sentence)
    lines += [
        "",
        "# No answer",
        "",
        "A call that the ledger gave no answer to ends with `UNAVAILABLE`, one of these reasons as",
        "`ErrorInfo`, and a `google.rpc.RetryInfo` that says when to send the same operation again: the",
        "same, with its `operation_id`, so that it happens once however often it is sent. Within a",
        "`Batch` it is `OperationResult.unavailable`. Where only this caller has to wait, since it has",
        f"reached [a limit](../operating/limits.md), the code is `RESOURCE_EXHAUSTED`: {_of_one_caller()}.",
    ]
    for reason in reasons("UnavailableReason", "UNAVAILABLE_REASON_"):
        lines += _section(reason, "")
    return "\n".join([*lines, *_OTHER_CODES, ""])


_OTHER_CODES = """
# Other codes

| gRPC code | when | what became of the operation |
|---|---|---|
| `DEADLINE_EXCEEDED` | the call's deadline, or the server's own, has passed | unknown: send it again |
| `CANCELLED` | the caller has gone, or the server has stopped before it took the call | unknown: send it again |
| `RESOURCE_EXHAUSTED`, without a reason | the message or its metadata is larger than the server accepts | nothing was done |
| `UNIMPLEMENTED` | the server does not know the method | nothing was done |
| `INTERNAL` | a bug; `ErrorInfo.metadata.request` names the call in the server's log | unknown: send it again |
""".rstrip().split("\n")


def _of_one_caller() -> str:
    return ", ".join(f"`{reason.name}`" for reason in sorted(OF_ONE_CALLER))


def _section(reason: Reason, sentence: str) -> list[str]:
    example = json.dumps(reason.example, ensure_ascii=False)
    said = [f"> {sentence}", ""] if sentence not in ("", reason.text) else []
    return ["", f"## {reason.name}", "", *said, reason.text, "", "```json", example, "```"]


def reasons(enum: str, prefix: str) -> Iterator[Reason]:
    """The members of an enum of `types.proto` with what their comments say, in order.

    Raises:
        ValueError: A comment has no example of the reason's metadata.
    """
    with tempfile.TemporaryDirectory(prefix="peculium-reference-") as folder:
        compiled = Path(folder) / "types.binpb"
        failed = protoc.main(
            [
                "protoc",
                f"-I{ROOT / 'proto'}",
                f"-I{Path(protoc.__file__).parent / '_proto'}",
                "--include_source_info",
                f"--descriptor_set_out={compiled}",
                TYPES,
            ]
        )
        if failed:
            raise RuntimeError(f"protoc cannot compile {TYPES}")
        [file] = FileDescriptorSet.FromString(compiled.read_bytes()).file
    comments = {
        tuple(location.path): location.leading_comments
        for location in file.source_code_info.location
    }
    [index] = [number for number, each in enumerate(file.enum_type) if each.name == enum]
    for place, value in enumerate(file.enum_type[index].value):
        if value.number:
            comment = " ".join(comments[_ENUM_PATH, index, _VALUE_PATH, place].split())
            text, brace, example = comment.partition("{")
            yield Reason(
                name=value.name.removeprefix(prefix),
                number=value.number,
                text=text.strip(),
                example=json.loads(brace + example),
            )


def configuration_page() -> str:
    """The page of all settings."""
    lines = [
        "# Configuration",
        "",
        "Every setting is an environment variable, and most are a flag too; the flag wins. An empty",
        "variable counts as not set. All of them are checked at once when a program starts, which tells",
        "every problem that it finds, and prints what it runs with, never a password or a key.",
        "",
        "<!-- Written by tools/reference.py from server/peculium_server/config.py. -->",
        "",
        "## The server: `peculium serve`",
        "",
        "`peculium migrate` takes `database_url` and `data_dir` of these.",
        *_settings(SERVER_SETTINGS),
        "",
        "## The client and the command line",
        *_settings(CLIENT_SETTINGS),
        "",
    ]
    return "\n".join(lines) + _KEYS_FILE


_KEYS_FILE = """
## The key file

TOML, with one table for each key, and for each rule about clients' certificates. The server is told the SHA-256
of a key and never the key itself; a caller presents the key as `authorization: Bearer <key>`. The file is read
again when it changes. What keys and certificates are, and how they are used, is in
[who may call](../operating/identity.md).

```toml
[[keys]]
principal = "research-gateway"  # Who calls: 1 to 256 bytes, not "system"
role = "agent"                  # or "admin", or "auditor"
sha256 = "0b0a…"                # 64 hexadecimal digits
roots = ["0192f0c1-…"]          # If it is limited to some roots: their ids
expires = 2027-01-01T00:00:00Z  # If it does

[[certificates]]
spiffe = "spiffe://example.org/agents/*" # A SPIFFE id, or all below one
role = "agent"
roots = ["0192f0c1-…"]          # As of a key
```

| role | may call |
|---|---|
| `agent` | `LedgerService`: reserve, settle, delegate, with what it holds |
| `auditor` | `AuditService`: read and verify everything |
| `admin` | `AdminService`, and what the other two may |

A principal may have several keys, so that a new one can be brought in before the old one is taken
out. `peculium keys new` makes a key and the lines for it. Of any other text, which does not begin with `pek_`,
the digest is `printf %s "$KEY" | sha256sum`.
"""


def _settings(settings: tuple[Setting, ...]) -> Iterator[str]:
    for setting in settings:
        default = f"`{setting.default}`" if setting.default else "none"
        yield ""
        yield f"### {setting.variable}"
        yield ""
        yield setting.meaning
        yield ""
        yield f"Flag: `{setting.flag}`. Default: {default}."


def cli_page() -> str:
    """The page of all verbs, in the order of the command line's own help."""
    lines = [
        "# The command line",
        "",
        "`peculium` runs servers, and speaks to them for operators and auditors. Where a budget is asked",
        "for, its path does (`acme/research`), or its ids (`ROOT/BUDGET`, as `--json` prints them).",
        "With `--json` there is one JSON object per line, whose amounts are integers of the tree's unit.",
        "",
        "| exit code | |",
        "|---|---|",
        "| 0 | done |",
        "| 1 | refused by the ledger, or not verified |",
        "| 2 | wrong usage: arguments, settings, credentials |",
        "| 3 | no answer: a server or a database cannot be reached, or not be relied upon |",
        "",
        "<!-- Written by tools/reference.py from server/peculium_server/cli. -->",
    ]
    for words, command in _verbs(typer.main.get_command(app), ()):
        lines += ["", f"## peculium {' '.join(words)}", "", *_help(command)]
        rows = list(_parameters(command))
        if rows:
            lines += ["", "| | |", "|---|---|", *rows]
    return "\n".join([*lines, ""])


def _verbs(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name, below in command.commands.items():
        yield from _verbs(below, (*words, name))


def _help(command: Any) -> Iterator[str]:
    """What a verb says of itself; its examples are the indented lines."""
    for line in inspect.cleandoc(command.help or "").split("\n"):
        example = line.strip().startswith("peculium ")
        yield f"    {line.strip()}" if example else line


def _parameters(command: Any) -> Iterator[str]:
    for parameter in command.params:
        said = getattr(parameter, "help", None) or ""
        argument = parameter.param_type_name == "argument"
        name = (parameter.name or "").upper() if argument else ", ".join(parameter.opts)
        yield f"| `{name}` | {said} |"


def main() -> int:
    """Write the pages, or with `verify` compare; 1 when one is out of date."""
    sys.path.insert(0, str(ROOT))
    stale = 0
    for path, text in pages().items():
        target = ROOT / path
        present = target.read_text(encoding="utf-8") if target.exists() else ""
        if sys.argv[1:] == ["verify"]:
            if present != text:
                sys.stderr.write(f"{path}: out of date; run tools/reference.py\n")
                stale = 1
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main())
