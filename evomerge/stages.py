"""The stages that exist, and the named methods as lines of them: one table each, pure data.

Symbols: W_i source i of N, W_0 base, D_i = W_i - W_0; X_i contributions, G_i gates, w_i weights, y the merged
contribution; m x n a matrix as torch's Linear stores it (out x in). `*` is elementwise, `'` the transpose.
The function of each stage has its name; `operators.line` finds it.
"""

from collections.abc import Mapping

from evomerge.methods import Method, Parameter, Stage, parse_line

P = Parameter

def _share(default: float, per_source: bool = False) -> Parameter:
    return P(default=default, low=0.0, high=1.0, per_source=per_source)


def _one_of(*options: str) -> Parameter:
    return P(default=options[0], options=options)


_FLAG = P(default=1.0, low=0.0, high=1.0, whole=True)
_DENSITY = _share(0.5, per_source=True)
_SCOPE = _one_of("tensor", "row", "layer", "model")


def _table(*stages: Stage) -> dict[str, Stage]:
    return {stage.name: stage for stage in stages}


def _stage(kind: str, name: str, formula: str, reference: str = "", *, neutral: Mapping[str, float | str] | None = None,
           alone: bool = False, elementwise: bool = False, random: bool = False, statistics: tuple[str, ...] = (),
           **parameters: Parameter) -> Stage:  # fmt: skip
    return Stage(
        name=name, kind=kind, parameters=parameters, formula=formula, reference=reference, neutral=neutral,
        alone=alone, elementwise=elementwise, random=random, statistics=statistics,
    )  # fmt: skip


#: Stages of plain arithmetic: thresholds, masks, votes, sums.
_ELEMENTWISE = _table(
    _stage("origin", "zero", "X_i = W_i", elementwise=True),
    _stage("origin", "base", "X_i = W_i - W_0", "Ilharco 2023 (arXiv:2212.04089) 2", elementwise=True),
    _stage("origin", "base_if_any", "X_i = W_i - W_0, or W_i without a base", elementwise=True),
    _stage(
        "edit", "trim", "X_i * [|X_i| among its k greatest], k = int(density * entries)",
        "Yadav 2023 (arXiv:2306.01708) 4.1", neutral={"density": 1.0}, elementwise=True,
        density=_DENSITY, scope=_SCOPE, rescale=_one_of("none", "1/p", "l1", "l2"),
        count=_one_of("floor", "above", "below"),
    ),
    _stage(
        "edit", "drop", "M_i * X_i / p_i, M_i random with P(1) = density_i = p_i",
        "Yu 2024 (arXiv:2311.03099) 3, eq. 2", neutral={"density": 1.0}, elementwise=True, random=True,
        density=_DENSITY, rescale=_one_of("1/p", "l1", "l2", "none"),
    ),
    _stage(
        "edit", "magprune", "M_ij X_ij / p_ij, P(M_ij = 1) = p_ij = density_i - epsilon_i + 2 epsilon_i r_ij, "
        "r_ij the rank of |X_ij| in its row, from 0 to 1", "Deep 2024, DELLA (arXiv:2406.11617) 3",
        neutral={"density": 1.0}, random=True,
        density=_share(0.7, per_source=True), epsilon=_share(0.07, per_source=True),
        rank=_one_of("row", "tensor", "magnitude"), rescale=_one_of("1/p", "l1", "l2", "none"),
    ),
    _stage(
        "edit", "band", "X_i * [|X_i| among its (gamma + density) n greatest, but not among the gamma n greatest]",
        "Davari 2024, Model breadcrumbs (arXiv:2312.06795) 3", neutral={"density": 1.0, "gamma": 0.0}, elementwise=True,
        density=_share(0.2, per_source=True), gamma=_share(0.1, per_source=True),
        scope=_one_of("row", "tensor", "layer", "model"), count=_one_of("after", "within", "full", "bottom"),
        rescale=_one_of("none", "1/p", "l1", "l2"),
    ),
    _stage(
        "edit", "sign1bit", "sign(X_i) * mean of |X_i| over its entries that are not 0",
        "Liu 2025, 1bit-Merging (arXiv:2502.10743) 3", elementwise=True, scope=_SCOPE,
    ),
    _stage(
        "edit", "winsor", "sign(X_i) * min(max(|X_i|, its q quantile), its 1 - q quantile)",
        "Du 2024, PCB-Merging (arXiv:2410.02396), its code", neutral={"q": 0.0}, elementwise=True,
        q=P(default=1e-4, low=0.0, high=0.5), scope=_SCOPE,
    ),
    _stage(
        "gate", "elect", "G_i = [sign(w_i X_i) = s], s = sign(sum_i (1 + slack_i) w_i X_i)",
        "Yadav 2023 (arXiv:2306.01708) 4.1", alone=True, elementwise=True,
        zero=_one_of("plus", "minus", "none", "majority", "tensor_majority"), vote=_one_of("sum", "count", "share"),
        slack=P(default=0.0, low=0.0, per_source=True),
    ),
    _stage(
        "gate", "argmax", "G_i = [|w_i G_i X_i| is the greatest of all sources]",
        "Marczak 2024, MagMax (arXiv:2407.06322) 3", alone=True, elementwise=True,
    ),
    _stage(
        "gate", "exclusive", "G_i = [X_i among the n best of its block of m that no earlier source took]",
        "Yang 2025, CABS (arXiv:2503.01874) 4",
        n=P(default=64.0, low=1.0, whole=True), m=P(default=256.0, low=1.0, whole=True),
        order=P(default=0.0, per_source=True),
        reuse=P(default=0.0, low=0.0, high=1.0, whole=True),
    ),
    _stage(
        "weigh", "ema", "w_i * (1 - decay) decay^(N - i), the first without (1 - decay)",
        "Li 2025, PMA (arXiv:2505.12082) 3", alone=True, elementwise=True, decay=_share(0.8),
    ),
    _stage("weigh", "wma", "w_i * i", "Li 2025, PMA (arXiv:2505.12082) 3", alone=True, elementwise=True),
    _stage("combine", "sum", "y = sum_i w_i G_i X_i", "Ilharco 2023 (arXiv:2212.04089) 2", elementwise=True),
    _stage(
        "combine", "mean", "y = sum_i w_i G_i X_i / sum_i w_i G_i (normalize=0 and no gate: the sum)",
        "Wortsman 2022 (arXiv:2203.05482) 2", elementwise=True, normalize=_FLAG,
    ),
    _stage(
        "combine", "restored", "y = sum_i w_i r_i G_i X_i / sum_i w_i G_i, r_i = entries in the row / those that count",
        "Deep 2024, DELLA (arXiv:2406.11617), its code",
    ),
    _stage("shape", "scale", "scale * y", "lambda of Ilharco 2023", neutral={"scale": 1.0}, elementwise=True,
           scale=P(default=1.0)),
    _stage("shape", "gain", "gain * (of + y) - of", "a norm that multiplies by 1 + weight (Gemma), scaled",
           neutral={"gain": 1.0}, elementwise=True, gain=P(default=1.0), of=P(default=1.0)),
    _stage(
        "shape", "consensus", "y * [k of the |D_i| or more are > mask_scale_i |y - D_i|]",
        "Wang 2024, TALL masks (arXiv:2405.07813) 4", neutral={"k": 0.0}, elementwise=True,
        mask_scale=P(default=0.4, low=0.0, per_source=True), k=P(default=2.0, low=0.0, whole=True),
    ),
    _stage(
        "shape", "tall", "y * [|D_i| > mask_scale_i |y - D_i|], i = source",
        "Wang 2024, TALL masks (arXiv:2405.07813) 3", elementwise=True,
        mask_scale=P(default=0.4, low=0.0, per_source=True), source=P(default=0.0, low=0.0, whole=True),
    ),
    _stage(
        "shape", "lines", "(a + b l / (L - 1)) * y in layer l of L, a * y outside; auto: a = |mean_i D_i|_1 / |y|_1",
        "Wang 2025, LiNeS (arXiv:2410.17146) 4", elementwise=True,
        a=P(default=0.5), b=P(default=0.5), mode=_one_of("auto", "given"),
    ),
)  # fmt: skip

#: Gates and weighs.
_GATES = _table(
    _stage(
        "edit", "near", "X_i * min(1, t_i / |X_i|)", "nearswap, a recipe of the community (mergekit)", elementwise=True,
        t=P(default=1e-3, low=0.0, per_source=True),
    ),
    _stage(
        "gate", "variance", "G = [var_i X_i among its k greatest], k = int(share * entries where var > 0)",
        "Wan 2024, FuseChat (arXiv:2408.07990) 3.2, as applied by mergekit", neutral={"share": 1.0}, alone=True,
        elementwise=True, share=_share(0.1),
    ),
    _stage(
        "weigh", "energy", "w_i mean((M X_i)^2) / sum_j, M = [var_i X_i among its k greatest], k as in `variance`",
        "Wan 2024 (arXiv:2408.07990) 3.2", alone=True, elementwise=True,
        select=_share(1.0), floor=P(default=0.0, low=0.0),
    ),
    _stage(
        "gate", "compete", "G_i = g_i / sum_j g_j, g_i = minmax(top_ratio(exp(N minmax(|X_i|)^2) tanh(D_i sum_j D_j)))",
        "Du 2024 (arXiv:2410.02396) 3", ratio=_share(0.1), inter=_one_of("raw", "normalized"),
        scope=_one_of("model", "tensor", "row", "layer"),
    ),
    _stage(
        "gate", "widen",
        "G_i = (g(rank ||W_i| - |W_0||) + g(rank (1 - cos(W_i, W_0)))) / 2 for each column, "
        "g(r_i) = score where r_i > threshold mean(r_i), else softmax_i(r_i)",
        "Yu 2024 (arXiv:2408.03092) 3", threshold=P(default=1.0, low=0.0), score=P(default=1.0, low=0.0),
    ),
    _stage(
        "gate", "ram", "G_i = M_i / sum_j M_j, M_i = [|X_i| > epsilon]", "RAM (arXiv:2601.13572)", elementwise=True,
        epsilon=P(default=1e-5, low=0.0),
    ),
    _stage(
        "gate", "own", "1 + r min(alpha, shared_i / own_i) where G_i = 1; of own_i entries, shared_i with 0 < G_i < 1",
        "RAM+ (arXiv:2601.13572)", neutral={"r": 0.0}, elementwise=True, r=P(default=0.1, low=0.0),
        alpha=P(default=0.2, low=0.0), scope=_SCOPE,
    ),
    _stage(
        "gate", "trust", "G = [sum_{i != j} |X_i| |X_j| <= its quantile]",
        "Sun 2025 (arXiv:2501.15065) 4, without data", neutral={"quantile": 1.0}, alone=True,
        elementwise=True, quantile=_share(0.99), scope=_one_of("model", "tensor", "row", "layer"),
    ),
    _stage(
        "gate", "fusion", "G_i = [I_i >= median + multiplier (Q3 - Q1)], I_i = |X_i| KL(softmax row of W_i || of W_0)",
        "Arcee Fusion (mergekit)", multiplier=P(default=1.5, low=0.0),
    ),
)  # fmt: skip

#: Lengths and angles.
_GEOMETRY = _table(
    _stage(
        "combine", "slerp", "y = (sin((1-t) o) X_1 + sin(t o) X_2) / sin(o), o the angle between the two heaviest",
        "Shoemake 1985, Animating rotation with quaternion curves, 3.3", elementwise=True, t=_share(0.5),
        collinear=_share(0.9995), zero=_one_of("chord", "right_angle"), scope=_SCOPE,
    ),
    _stage(
        "combine", "nuslerp", "y = (sin((1-t) o) X_1 + sin(t o) X_2) / sin(o), t = w_2 / (w_1 + w_2), along an axis",
        "Shoemake 1985, 3.3; axes as in mergekit's nuslerp", axis=_one_of("flatten", "rows", "columns"),
        collinear=_share(1.0), zero=_one_of("chord", "right_angle"),
    ),
    _stage(
        "combine", "multislerp", "y = (sum_i w_i |X_i|) u / |u|, u = sum_i w_i X_i / |X_i|",
        "barycentric slerp (mergekit)", elementwise=True, normalize=_FLAG, scope=_SCOPE,
    ),
    _stage(
        "combine", "karcher", "y = (sum_i w_i |X_i|) argmin_u sum_i w_i angle(u, X_i)^2, |u| = 1",
        "Karcher 1977, Riemannian center of mass and mollifier smoothing, 1", elementwise=True,
        max_iter=P(default=10.0, low=0.0, whole=True), tol=P(default=1e-5, low=0.0), scope=_SCOPE,
    ),
    _stage(
        "combine", "doge",
        "y = sum_i v_i top_density(X_i + d), v_i = eta w_i / |X_i|, d: <sum_i v_i (X_i + d), X_j> = |X_j|^2 row by row",
        "Wei 2025 (arXiv:2501.01230) 4, without projection", eta=P(default=0.07, low=0.0), density=_share(0.3),
        elsewhere=_one_of("base", "sum"), cut=_share(1e-3),
    ),
    _stage(
        "weigh", "norm", "w_i |X_i|^exponent, divided by their sum if normalize", "Zhou 2024 (arXiv:2406.11385) 3",
        elementwise=True, exponent=P(default=2.0), normalize=_FLAG, scope=_one_of("model", "tensor", "layer"),
    ),
    _stage(
        "shape", "stock", "t y, t = N c / (1 + (N-1) c), c the mean cosine between the X_i",
        "Jang 2024, Model stock (arXiv:2403.19522) 4", alone=True, elementwise=True,
        average=_one_of("cosines", "angles"), clamp=_FLAG, floor=P(default=0.0, low=0.0), scope=_SCOPE,
    ),
    _stage(
        "shape", "norm_match", "y (sum_i |w_i| |X_i| / sum_i |w_i|) / |y|", "", elementwise=True, scope=_SCOPE,
    ),
)  # fmt: skip

#: Singular vectors and linear systems.
_SPECTRAL = _table(
    _stage("origin", "centre", "X_i = W_i - sum_j w_j W_j / sum_j w_j", elementwise=True),
    _stage(
        "origin", "lore", "in turns: X_i = W_i - t, its singular values less mu s_max but >= 0; t = mean_i(W_i - X_i)",
        "Liu 2025, LoRE-Merging (arXiv:2502.10749)",
        mu=_share(0.01), iterations=P(default=10.0, low=0.0, high=1000.0, whole=True),
    ),
    _stage("basis", "knots", "Z_i = S V_i' of [X_1 .. X_N] = U S [V_1 .. V_N]'; back: U y",
           "Stoica 2025, KnOTS (arXiv:2410.19735)", cut=P(default=1e-5, low=0.0)),
    _stage("edit", "star", "sum_{j<=k} s_j u_j v_j' * sum s / sum_{j<=k} s_j, k least with sum_{j<=k} s_j >= eta sum s",
           "Lee 2025, STAR (arXiv:2502.10339)", neutral={"eta": 1.0}, eta=_share(0.4, per_source=True)),
    _stage("edit", "lowrank", "sum_{j<=k} s_j u_j v_j', k = int(rank min(m, n))", "Choi 2024, CART (arXiv:2412.12153)",
           neutral={"rank": 1.0}, rank=_share(0.04, per_source=True)),
    _stage(
        "combine", "polar_stack", "polar(U) S polar(V)': c triplets of sum_i w_i X_i, k of each (I - U_c U_c') w_i X_i",
        "Gargiulo 2025, Task singular vectors (arXiv:2412.00081); Marczak 2025 (arXiv:2502.04959)",
        common=_share(0.8), rank=P(default=1.0, low=0.01, high=1.0), exponent=_share(0.0),
        exclude=P(default="*text_projection*", text=True),
    ),
    _stage(
        "combine", "delta_solve", "y = B C^-1, C = sum_i w_i X_i'X_i / |X_i|^2, B = sum_i w_i X_i X_i'X_i / |X_i|^2",
        "Cheng 2025, WUDI-Merging (arXiv:2503.08099), and its closed form SWUDI",
        filter=_one_of("none", "exponential", "ridge"), time=P(default=300.0, low=0.0), rank=_share(1.0),
        rule=_one_of("ratio", "energy", "participation", "participation_sqrt", "entropy", "stable", "gavish_donoho"),
        init=_one_of("sum", "mean", "zero"), floor=P(default=1e-8, low=1e-30),
        exclude=P(default="*lm_head*", text=True),
    ),
    _stage(
        "combine", "descent", "y from sum_i w_i X_i by Adam on sum_i w_i |(y - X_i) X_i'|^2 / |X_i|^2",
        "Cheng 2025, WUDI-Merging (arXiv:2503.08099)", iterations=P(default=300.0, low=0.0, high=1e5, whole=True),
        rate=P(default=1e-5, low=0.0), exclude=P(default="*lm_head*", text=True),
    ),
    _stage(
        "combine", "opcm", "y_t = (l_{t-1} y_{t-1} + P(w_t X_t)) / l_t, |y_t| = mean_{i<=t} |w_i X_i| over the model",
        "Tang 2025, Merging models on the fly (arXiv:2501.09522)", alpha=_share(0.5),
        order=P(default=0.0, per_source=True), exclude=P(default="*embed*", text=True),
    ),
    _stage("shape", "iso", "U S^exponent V' * sum S / sum S^exponent of y = U S V'",
           "Marczak 2025, No task left behind (arXiv:2502.04959)", neutral={"exponent": 1.0}, exponent=_share(0.0)),
    _stage("shape", "svc", "s_j * N / sum_i max(alpha, <u_j'y, u_j'X_i> / |u_j'X_i|^2) of y = U S V'",
           "Singular value calibration (arXiv:2602.05536)", alpha=P(default=1.0, low=0.001)),
)  # fmt: skip

#: What methods of conjugate gradients begin from, and how far they go.
_INIT = _one_of("average", "base")
_ITERATIONS = P(default=100.0, low=1.0, whole=True)

#: Statistics as inputs.
_STATISTICAL = _table(
    _stage(
        "gate", "fisher", "G_i = F_i / sum_j F_j, F_i = max(F_i, floor) / |F_i| or (F_i + floor) / |F_i|",
        "Matena 2022 (arXiv:2111.09832) 3", alone=True, statistics=("fisher",),
        floor=P(default=1e-6, low=0.0), rule=_one_of("max", "add"), floored=_one_of("all", "first"),
        norm=_one_of("model", "tensor", "none"),
    ),
    _stage(
        "gate", "salient", "G_i = [X_i^2 mean(x^2) among its k greatest where no G_j, j < i]",
        "OBIM: optimal brain iterative merging (2025)", statistics=("square",), density=_share(0.3, per_source=True),
        order=P(default=0.0, per_source=True),
    ),
    _stage(
        "weigh", "sensitivity", "w_i softmax_i(t_i a_i / temperature), a_i = sensitivity of the scope, |a_i| = 1",
        "Liu 2025 (arXiv:2502.12420)", alone=True, statistics=("sensitivity",),
        temperature=P(default=1.0, low=1e-6), transfer=P(default=1.0, per_source=True),
        scope=_one_of("layer", "tensor"),
    ),
    _stage(
        "weigh", "loss", "w_i softmax_i(-loss_i / temperature)", "Xiao 2023 (arXiv:2311.13534)",
        alone=True, statistics=("loss",), temperature=P(default=5.0, low=1e-6),
    ),
    _stage(
        "combine", "regmean", "(sum_i w_i X_i G_i) (sum_i w_i G_i)^-1, Gram matrices G_i, off-diagonals times alpha",
        "Jin 2023 (arXiv:2212.09849) 3", statistics=("gram",), alpha=_share(0.9), ridge=P(default=0.0, low=0.0),
    ),
    _stage(
        "combine", "match_fisher", "sum_i w_i F_i * (y - X_i) = 0 by conjugate gradients",
        "Tam 2024 (arXiv:2312.04339) 4", statistics=("fisher",), iterations=_ITERATIONS, init=_INIT,
    ),
    _stage(
        "combine", "match_gram", "sum_i w_i (y - X_i) G_i = 0 by conjugate gradients, off-diagonals of G_i times alpha",
        "Tam 2024 (arXiv:2312.04339) 4", statistics=("gram",), iterations=_ITERATIONS, init=_INIT, alpha=_share(1.0),
    ),
    _stage(
        "combine", "match_kronecker", "sum_i w_i B_i (y - X_i) G_i = 0 by conjugate gradients, off-diagonals by alpha",
        "Tam 2024 (arXiv:2312.04339) 4", statistics=("gram", "gram_out"), iterations=_ITERATIONS, init=_INIT,
        alpha=_share(1.0),
    ),
    _stage(
        "shape", "relax", "y * (1 - (1 - omega) a / max(a)), a the base's mean |x| per input channel",
        "Nobari 2025, AIM (arXiv:2502.02421)", neutral={"omega": 1.0}, statistics=("activation",), omega=_share(0.4),
    ),
)  # fmt: skip

#: Every stage by name.
STAGES: Mapping[str, Stage] = {**_ELEMENTWISE, **_GATES, **_GEOMETRY, **_SPECTRAL, **_STATISTICAL}


#: One line for each method: its name, its stages with this method's defaults, and where it was published.
_LINES = (
    ("linear", "zero | mean", "Wortsman 2022, Model soups (arXiv:2203.05482) 2"),
    ("sma", "zero | mean", "Li 2025, Model merging in pre-training (arXiv:2505.12082) 3"),
    ("ema", "zero | ema | mean", "Li 2025 (arXiv:2505.12082) 3"),
    ("wma", "zero | wma | mean", "Li 2025 (arXiv:2505.12082) 3"),
    ("passthrough", "zero | sum | scale", "mergekit"),
    ("task_arithmetic", "base | sum | scale", "Ilharco 2023, Editing models with task arithmetic (arXiv:2212.04089) 2"),
    ("expo", "base | sum | scale(1.3)", "Zheng 2024, ExPO (arXiv:2404.16792) 2"),
    ("ties", "base | trim(0.2, scope=model) | elect | mean | scale", "Yadav 2023, TIES-Merging (arXiv:2306.01708) 4.1"),
    ("ties_sv", "base | trim(0.2, scope=model) | elect | mean | scale", "TIES with slack variables: elect's `slack`"),
    ("dare_linear", "base | drop | mean(normalize=0) | scale", "Yu 2024, DARE: super Mario (arXiv:2311.03099) 3"),
    ("dare_ties", "base | drop | elect | mean(normalize=0) | scale", "Yu 2024 (arXiv:2311.03099) 3, with Yadav 2023"),
    ("della", "base | magprune | elect | mean | scale(1.1)", "Deep 2024, DELLA-Merging (arXiv:2406.11617) 3"),
    ("della_linear", "base | magprune | mean(normalize=0) | scale", "Deep 2024 (arXiv:2406.11617) 3, no election"),
    ("breadcrumbs", "base | band | mean(normalize=0) | scale(0.4)", "Davari 2024, Breadcrumbs (arXiv:2312.06795) 3"),
    ("breadcrumbs_ties", "base | band | elect | mean(normalize=0) | scale(0.4)", "Davari 2024, with Yadav 2023"),
    ("magmax", "base | argmax | sum | scale(0.5)", "Marczak 2024, MagMax (arXiv:2407.06322) 3"),
    ("emr", "base | elect(minus) | argmax | sum | scale", "Huang 2024, EMR (arXiv:2405.17461) 3, its unified vector"),
    ("cabs", "base | exclusive | sum | scale(1.2)", "Yang 2025, CABS (arXiv:2503.01874) 4"),
    ("one_bit", "base | sign1bit | sum | scale", "Liu 2025, 1bit-Merging (arXiv:2502.10743) 3, its static part"),
    ("tall_mask", "base | sum | tall", "Wang 2024, TALL masks (arXiv:2405.07813) 3"),
    ("consensus_ta", "base | sum | consensus | scale(0.3)", "Wang 2024 (arXiv:2405.07813) 4"),
    (
        "consensus_ties", "base | trim(0.2, scope=model) | elect | sum | consensus | scale(0.3)",
        "Wang 2024 (arXiv:2405.07813) 4, with Yadav 2023",
    ),
    ("lines", "base | sum | lines", "Wang 2025, LiNeS (arXiv:2410.17146) 4"),
    # -- gates
    ("sce", "base | elect | energy(0.1) | mean | scale", "Wan 2024, FuseChat (arXiv:2408.07990) 3.2"),
    ("pcb", "base | winsor(scope=model) | compete | sum | scale(1.2)", "Du 2024, PCB-Merging (arXiv:2410.02396) 3"),
    ("widen", "base | widen | sum", "Yu 2024, Extend model merging to pre-trained models (arXiv:2408.03092) 3"),
    ("ram", "base | ram | sum", "RAM (arXiv:2601.13572)"),
    ("ramplus_tl", "base | ram | own | sum", "RAM+ (arXiv:2601.13572)"),
    ("tatr", "base | trust | sum | scale", "Sun 2025, Task arithmetic in trust region (arXiv:2501.15065) 4"),
    ("arcee_fusion", "base | fusion | sum", "Arcee Fusion (mergekit)"),
    ("nearswap", "base | near | sum", "nearswap (mergekit)"),
    # -- lengths and angles
    ("slerp", "base_if_any | slerp | scale", "Shoemake 1985, Animating rotation with quaternion curves, 3.3"),
    ("nuslerp", "base_if_any | nuslerp | scale", "Shoemake 1985, 3.3; mergekit's nuslerp"),
    ("multislerp", "base_if_any | multislerp | scale", "barycentric slerp (mergekit)"),
    ("karcher", "base_if_any | karcher | scale", "Karcher 1977, Riemannian center of mass and mollifier smoothing, 1"),
    ("model_stock", "base | mean | stock | scale", "Jang 2024, Model stock (arXiv:2403.19522) 4"),
    ("metagpt", "base | norm | sum | scale", "Zhou 2024, MetaGPT (arXiv:2406.11385) 3"),
    ("doge", "base | doge | scale", "Wei 2025, Adaptive projective gradient descent (arXiv:2501.01230) 4"),
    # -- singular vectors and linear systems
    ("star", "base | star | mean | scale", "Lee 2025, STAR (arXiv:2502.10339)"),
    ("iso_c", "base | polar_stack(common=1) | scale", "Marczak 2025, No task left behind (arXiv:2502.04959)"),
    ("iso_cts", "base | polar_stack | scale", "Marczak 2025, No task left behind (arXiv:2502.04959)"),
    ("tsv_m", "base | polar_stack(common=0, exponent=1) | scale", "Gargiulo 2025, TSV-Merge (arXiv:2412.00081)"),
    ("svc", "base | sum | svc | scale", "Singular value calibration (arXiv:2602.05536)"),
    ("wudi", "base | delta_solve | scale", "Cheng 2025, WUDI-Merging (arXiv:2503.08099), its loss in closed form"),
    ("swudi", "base | delta_solve(filter=exponential, rank=0.85) | scale", "SWUDI, of WUDI-Merging's authors"),
    ("aswudi", "base | delta_solve(rule=participation_sqrt) | scale", "ASWUDI, of WUDI-Merging's authors"),
    ("wudi_adam", "base | descent | scale", "Cheng 2025, WUDI-Merging (arXiv:2503.08099), as released"),
    ("actmat", "base | delta_solve(filter=ridge, time=10000, init=mean) | scale", "ACTMat (arXiv:2604.01329)"),
    (
        "knots_ties", "base | knots | trim(1, scope=model, count=above) | elect(zero=majority) | mean | scale",
        "Stoica 2025, KnOTS (arXiv:2410.19735), with Yadav 2023",
    ),
    ("knots_mean", "base | knots | mean | scale", "Stoica 2025, KnOTS (arXiv:2410.19735)"),
    ("cart", "centre | lowrank | sum | scale", "Choi 2024, Revisiting weight averaging (arXiv:2412.12153)"),
    ("lore", "lore | sum | scale", "Liu 2025, LoRE-Merging (arXiv:2502.10749), its abstract"),
    ("opcm", "base | opcm | scale", "Tang 2025, Merging models on the fly (arXiv:2501.09522)"),
    # -- statistics
    ("fisher", "zero | fisher | mean", "Matena 2022, Fisher-weighted averaging (arXiv:2111.09832) 3"),
    ("regmean", "zero | regmean", "Jin 2023, Dataless knowledge fusion by merging weights (arXiv:2212.09849) 3"),
    ("mats", "base_if_any | match_kronecker", "Tam 2024, Merging by matching models (arXiv:2312.04339) 4"),
    ("mats_gram", "base_if_any | match_gram", "Tam 2024 (arXiv:2312.04339) 4"),
    ("mats_fisher", "base_if_any | match_fisher", "Tam 2024 (arXiv:2312.04339) 4"),
    ("aim", "base | sum | scale | relax", "Nobari 2025, Activation-informed merging (arXiv:2502.02421)"),
    ("obim", "base | salient | sum | scale", "Optimal brain iterative merging (2025)"),
    ("sens_merging", "base | sensitivity | sum | scale", "Liu 2025, Sens-Merging (arXiv:2502.12420)"),
    ("lm_cocktail", "zero | loss | mean", "Xiao 2023, LM-Cocktail (arXiv:2311.13534)"),
)

#: Every named method.
METHODS: Mapping[str, Method] = {
    name: Method(name=name, line=line, steps=parse_line(line, STAGES, f"method {name}"), reference=reference)
    for name, line, reference in _LINES
}
