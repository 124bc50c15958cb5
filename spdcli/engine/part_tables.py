"""What a decomposition is built of, and what moves it, a row each: importance functions, starts, optimizers ...

As `tables`, which has the losses: torch-free, and a row's code is imported when it is used.
"""

from __future__ import annotations

from dataclasses import dataclass

from spdcli.engine.tables import Choice


@dataclass(frozen=True)
class ImportanceFunction(Choice):
    """A kind of importance function (section 4.1).

    `code` builds the gates of one matrix, from the width of what they read, C and the settings. `reads_inner`: they
    read the inner activations x U instead of the matrix's input x. `attends`: Algorithm 1 mixes positions first, so
    that gates read 2 d_in numbers. `joint`: a transformer of all matrices' inputs comes first, and gates read what it
    gives, of a width of its own. `spans`: they can read coordinates in the span of a fixed set of data (basis span).
    `benchmarked`: `spd bench importance` times it.
    """

    reads_inner: bool = False
    attends: bool = False
    joint: bool = False
    spans: bool = False
    benchmarked: bool = True


IMPORTANCE_FUNCTIONS: dict[str, ImportanceFunction] = {
    "scalar": ImportanceFunction(
        "one MLP a slice, on its inner activation x . U_c", "spdcli.engine.importance:ScalarGates", reads_inner=True
    ),
    "vector": ImportanceFunction(
        "one MLP a slice, on the matrix's whole input x", "spdcli.engine.importance:VectorGates", spans=True
    ),
    "shared": ImportanceFunction(
        "one MLP for all slices of a matrix, on its input x", "spdcli.engine.importance:SharedGates", benchmarked=False
    ),
    "attention": ImportanceFunction(
        "attention over the sequence, then one MLP a slice (Eq. 4, Algorithm 1)",
        "spdcli.engine.importance:VectorGates",
        attends=True,
    ),
    "global": ImportanceFunction(
        "one transformer that reads the inputs of all matrices, then one linear map a slice",
        "spdcli.engine.importance:Readout",
        joint=True,
        spans=True,
        benchmarked=False,
    ),
}

ACTIVATIONS: dict[str, Choice] = {
    "relu": Choice("max(x, 0)", "spdcli.engine.gates:RELU"),
    "gelu": Choice("x times the normal distribution's cumulative at x", "spdcli.engine.gates:GELU"),
}

NORMS: dict[str, Choice] = {
    "none": Choice("the input as it is"),
    "rms": Choice("every position's input divided by its root mean square"),
}

BASES: dict[str, Choice] = {
    "full": Choice("all d_in coordinates"),
    "span": Choice("coordinates in the span of the prompts' inputs: the same functions on them, with fewer parameters"),
}

RELATIVE_BIASES: dict[str, Choice] = {
    "scalar": Choice("one learned number an offset"),
    "query": Choice("a learned vector an offset, multiplied by the query"),
}

RELATIVE_STARTS: dict[str, Choice] = {
    "zero": Choice("no bias"),
    "local": Choice("-0.5 |offset|, so that near positions come first; for relative = 'scalar'"),
}

GATE_STARTS: dict[str, Choice] = {
    "random": Choice("at random around gate_bias"),
    "inner": Choice(
        "a slice begins as on where the prompts' inputs make its inner activation largest, and off where it is 0; for "
        "kind = 'scalar'"
    ),
}

BACKENDS: dict[str, Choice] = {
    "auto": Choice("the fastest of the others for the sizes at hand"),
    "dense": Choice("all scores at once; for short sequences", "spdcli.engine.attention:dense_attention"),
    "blocked": Choice("strips of queries: memory linear in the length", "spdcli.engine.attention:blocked_attention"),
    "flex": Choice("torch's flex attention; GPU and relative = 'scalar'", "spdcli.engine.attention:flex_attention"),
}


DISTINCT = 1e-3  # inputs of a matrix that differ by less than this share of the larger norm are one to a dual start


@dataclass(frozen=True)
class Start(Choice):
    """How U and V start. `code` makes them of one matrix's W, C, inputs, second moment and generator.

    `needs_inputs`: it reads the matrix's inputs on the data. `needs_moment`: the second moment of its inputs on broad
    text. `fixed_data`: it is for a fixed set of prompts alone.
    """

    needs_inputs: bool = False
    needs_moment: bool = False
    fixed_data: bool = False


STARTS: dict[str, Start] = {
    "random": Start("Gaussian directions, U V of the norm of W", "spdcli.engine.subcomponents:random_start"),
    "inputs": Start(
        "the directions of C of the data's inputs, drawn at random, and what W makes of each",
        "spdcli.engine.subcomponents:inputs_start",
        needs_inputs=True,
    ),
    "svd": Start("the largest singular triples of W", "spdcli.engine.subcomponents:svd_start"),
    "svd_span": Start(
        "the largest singular triples of W on the span of the data",
        "spdcli.engine.subcomponents:svd_span_start",
        needs_inputs=True,
    ),
    "svd_text": Start(
        "the C slices that leave least of what W writes on the text data.stream",
        "spdcli.engine.subcomponents:svd_text_start",
        needs_moment=True,
    ),
    "dual": Start(
        "a slice for each distinct input of the prompts: it reads that one as 1 and the others as 0",
        "spdcli.engine.subcomponents:dual_start",
        needs_inputs=True,
        fixed_data=True,
    ),
    "dual_whitened": Start(
        "as dual, with the reading directions that answer least to broad text",
        "spdcli.engine.subcomponents:dual_whitened_start",
        needs_inputs=True,
        needs_moment=True,
        fixed_data=True,
    ),
}

OPTIMIZERS: dict[str, Choice] = {
    "adam": Choice("Adam; weight decay is added to the gradient", "torch.optim:Adam"),
    "adamw": Choice("Adam with decoupled weight decay", "torch.optim:AdamW"),
}

SCHEDULES: dict[str, Choice] = {
    "constant": Choice("the learning rate stays", "spdcli.engine.optimise:constant"),
    "cosine": Choice("it falls to 0 along half a cosine", "spdcli.engine.optimise:cosine"),
    "linear": Choice("it falls to 0 along a line", "spdcli.engine.optimise:linear"),
}
