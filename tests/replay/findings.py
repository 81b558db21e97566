"""What a replay has found, in words, with its own figures."""

from __future__ import annotations

from collections.abc import Iterator

from tests.replay.figures import OURS, Cell, Replay

CHECK, LOCKED, REDIS, SPLIT = "check-then-add", "locked counter", "Redis script", "equal split"
KEY, STRICT, MODELS = "LiteLLM", "LiteLLM strict", "LiteLLM per model"


def findings(replay: Replay) -> Iterator[str]:
    """A paragraph for each."""

    def cell(scenario: str, who: str = OURS) -> Cell:
        return replay.cells[scenario, who]

    def over(scenario: str, who: str) -> str:
        found = cell(scenario, who)
        return f"{found.over} of {found.trials} trials over, by {found.overshoot:,.0f}"

    yield (
        "**Without faults a locked counter does as well.** In the study's race (three children, cap 60) check-then-add"
        f" is {over('S2-60-3p', CHECK)}; the locked counter is over in {cell('S2-60-3p', LOCKED).over}, Peculium in"
        f" {cell('S2-60-3p').over}, and they admit {cell('S2-60-3p', LOCKED).calls:.1f} and {cell('S2-60-3p').calls:.1f} calls. With 256 agents check-then-add"
        f" is over by {cell('S2-256a', CHECK).overshoot:,.0f}. The counter asks for {cell('S2-u496', LOCKED).p50_ms:.1f} ms"
        f" a call in the median, Peculium for {cell('S2-u496').p50_ms:.1f} ms: that is what durability and a"
        " record cost. Who needs neither should take the counter."
    )
    yield (
        "**An equal split is safe and does little.** At a cap of 60 it makes"
        f" {cell('S2-60-3p', SPLIT).calls:.1f} calls; with 16 agents and a cap of 248 it uses"
        f" {cell('S2-u248', SPLIT).used:.0%} of the cap, Peculium {cell('S2-u248').used:.0%}; at 744 it is"
        f" {cell('S2-u744', SPLIT).used:.0%} to {cell('S2-u744').used:.0%}. And it is not safe once a share is handed out twice (D7:"
        f" {over('D7', SPLIT)}); of two workers with one capability, one owns it."
    )
    yield (
        "**Hidden retries are what counters do not see.** A client that tries 14 times inside one call bills"
        f" {600 + cell('S1b', LOCKED).overshoot:,.0f} on a cap of 600 past every counter; the transport reserves for each"
        " attempt, and stops at the cap. The same of calls that time out after they were billed (S1c: locked counter"
        f" {over('S1c', LOCKED)}), and of answers that fail after they were billed (D11: {over('D11', LOCKED)})."
    )
    yield (
        "**That has a price.** An attempt that may have been billed keeps its whole hold. In D11, where every call fails"
        f" once, Peculium makes {cell('D11').calls:.1f} useful calls in the mean: the first attempts use the cap up."
        f" Stranded in S1c: {cell('S1c').stranded:.0f} of 300, spent on estimates of calls that were billed less. It is"
        " marked as estimated, and comes back only when an admin resolves it by the bill."
    )
    yield (
        "**Missing usage.** Where usage is missing or zero, counters never stop"
        f" (S6-missing: {over('S6-missing', LOCKED)}; a negative number mints: D12, {over('D12', LOCKED)}). Peculium settles the"
        f" whole hold, and stops after {cell('S6-missing').calls:.0f} calls, half of what the cap would have paid for:"
        f" {cell('S6-missing').stranded:,.0f} of 2,000 are booked and were not billed. Usage that is told too high is believed,"
        f" too: at thirteen times the truth (S6-thirteenfold) {cell('S6-thirteenfold').calls:.0f} calls use the cap up, and"
        f" {cell('S6-thirteenfold').stranded:,.0f} of it are stranded until an admin resolves them."
    )
    yield (
        "**Streams.** A stream that is not asked for its usage tells none (S6-unasked: locked counter"
        f" {over('S6-unasked', LOCKED)}), and one that is cut never comes to it (S6-cut:"
        f" {over('S6-cut', LOCKED)}). Peculium takes both for billed as reserved:"
        f" {over('S6-unasked', OURS)}, and {over('S6-cut', OURS)}."
    )
    yield (
        "**Usage that is told too low is not found by any ledger.** At a sixteenth Peculium is"
        f" {over('S6-sixteenth', OURS)}, as everybody. Only the provider's bill shows it:"
        " [reconcile](how-to/reconcile.md). Nor is an agent stopped that ignores the refusal and has a key of its own (S5b:"
        f" {over('S5b', OURS)}): put the key behind a gateway that reserves."
    )
    yield (
        "**Estimates that are too low let through what is in flight.** With an option dropped (S7a) eight calls hold 300 each and are"
        f" billed 2,100: {cell('S7a').overshoot_most:,} over, which is the documented bound of"
        f" {replay.scenarios['S7a']['bound']:,}, booked as overrun, and everything after it is refused. With a first call that runs alone"
        f" (S7b) it is {cell('S7b').overshoot_most:,}. One image that costs 25 times the cap (S8a) is"
        f" {cell('S8a').overshoot_most:,} over. Estimates that are too high cost work instead: in S8b"
        f" {cell('S8b').false_refusals:.1f} calls in the mean are refused that would have fitted, and"
        f" {cell('S8b').used:.1%} of the cap are used. That is no better than the locked counter."
    )
    yield (
        "**Authority.** Counters know a budget by its name, and whoever knows the name spends. A child that has used its"
        " share up, and presents what its parent was handed (S2f), goes on at the locked counter"
        f" ({over('S2f', LOCKED)}), and is refused by Peculium ({over('S2f', OURS)}): that token was consumed when the"
        " parent accepted it. A parent that has given everything away (S2e) is refused by both; a message with a"
        " share in it that is delivered once more when the job is done (D7b) is a second share where the split is written down"
        f" nowhere (equal split: {over('D7b', SPLIT)}), and nothing in Peculium ({over('D7b', OURS)}), as when two have it"
        f" at once (D7: {over('D7', OURS)}). Who steals the *live* secret of a budget is its holder until it is used by the"
        " other, who then finds it consumed; a capability that is bound to a holder asks for that principal as well."
    )
    yield (
        "**Crashes.** A process that dies between reserving and calling (D1) strands"
        f" {cell('D1', LOCKED).stranded:.0f} in the locked counter for ever. In Peculium its holds lapse after their second"
        f" (found {cell('D1').lapse or 0:.1f} s after the end, sweeping included), and the money is not free even then, since"
        f" the calls may have been billed: {cell('D1').stranded:.0f} are stranded until somebody goes through the bill, then"
        f" {cell('D1').stranded_later:.0f}. If it dies after the answer (D2), check-then-add forgets the call. Spawn"
        f" slots that died with their agents (S2c) block the locked counter: {cell('S2c', LOCKED).calls:.0f} of 8 later calls, Peculium"
        f" {cell('S2c').calls:.0f}, after the bill."
    )
    yield (
        "**Lost replies.** A settlement that is sent again is booked twice by counters: the locked one invents"
        f" {cell('D3', LOCKED).invented:.0f} in the mean and is {over('D3', LOCKED)} (D3). A reservation that is sent again"
        f" is held twice: it makes {cell('D4', LOCKED).calls:.1f} calls where Peculium makes {cell('D4').calls:.1f} (D4)."
    )
    yield (
        "**Restarts and replicas.** Killed with its database while calls are in flight, what is kept in memory is forgotten"
        f" (D8): the locked counter is {over('D8', LOCKED)}"
        + (f", Redis as it comes {over('D8', REDIS)}" if ("D8", REDIS) in replay.cells else "")
        + f", Peculium {over('D8', OURS)}."
        " Two replicas of a gateway with a counter each spend twice"
        f" (D10: {over('D10', LOCKED)}); two servers of Peculium share one ledger."
    )
    yield (
        "**A clock that is off stops Peculium's agents.** With clocks an hour ahead (D6) everything from a principal-held"
        f" budget is refused as too old or too new: {cell('D6').calls:.1f} calls, and {cell('D6').false_refusals:.1f} false"
        f" refusals, where the locked counter makes {cell('D6', LOCKED).calls:.1f}. Nothing is lost, and nothing works"
        " until the clock is right. Cut off from the ledger (D9) agents stop, too, as they do with every store."
    )
    yield (
        "**Cancelling.** All that have something in common to freeze stop when the parent cancels (S2b: Peculium after"
        f" {cell('S2b').calls:.1f} calls, the locked counter after {cell('S2b', LOCKED).calls:.1f}, of 80 planned). The equal"
        f" split cannot be told: {cell('S2b', SPLIT).calls:.0f}."
    )
    yield from _litellm(replay)


def _litellm(replay: Replay) -> Iterator[str]:
    """What was found of LiteLLM, if it took part."""
    if KEY not in replay.contestants:
        return
    strict = STRICT if STRICT in replay.contestants else ""

    def over(scenario: str, who: str) -> str:
        found = replay.cells[scenario, who]
        return f"{found.over} of {found.trials} trials over, by {found.overshoot:,.0f}"

    def both(scenario: str) -> str:
        """By default, and failing closed."""
        closed = f"; failing closed {over(scenario, strict)}" if strict else ""
        return f"{over(scenario, KEY)}{closed}"

    key = [cell for (_, who), cell in replay.cells.items() if who == KEY]
    stranded = sum(cell.stranded * cell.trials for cell in key)
    billed = sum(
        cell.used * cell.trials * replay.scenarios[cell.scenario]["cap"]
        for cell in key
        if cell.kept
    )
    yield (
        "**LiteLLM's proxy has two kinds of budgets.** A key's is reserved before the call, as everywhere where holds are"
        f" kept: with 64 agents and a cap of 60 it is {both('S2-64a')}. What does not fit is by default held for what is left and"
        " called all the same, so that the last call is billed beyond the cap where it costs more than that: among 16 agents"
        f" with a cap of 248 {both('S2-u248')}; in a retry loop whose calls grow (S1) {both('S1')}. A key's budget for a model,"
        " and with the same code a provider's or a tag's, is checked before the call and added to after it:"
        f" {over('S2-64a', MODELS)}."
    )
    yield (
        "**LiteLLM and what is not told.** Attempts that fail after they were billed are released as if they were not"
        f" (S1b: {both('S1b')}; D11: {both('D11')}). Where usage is missing it counts what"
        f" was written, which the other counters do not (S6-missing: {both('S6-missing')}; a stream that is not asked, S6-unasked:"
        f" {both('S6-unasked')}); a stream that is cut (S6-cut): {both('S6-cut')}."
        + (
            f" By its own counter {stranded:,.0f} tokens are neither billed nor free at the end of {sum(c.trials for c in key):,}"
            f" trials, in which {billed:,.0f} of the caps were billed."
            if any(cell.kept for cell in key)
            else ""
        )
    )
