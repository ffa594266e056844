"""Every metric that metrics.jsonl can hold: what docs/metrics.md and the report's pages say of it.

A test holds the list to the keys in the source. mu, pi_old, pi_theta: docs/glossary.md. rho = pi_old/mu, r =
pi_theta/pi_old, A the advantage; a mean over tokens is over all response tokens of the step, on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """healthy: what a sound run shows; levels that a verdict judges by are those of megarl.report.thresholds."""

    meaning: str
    unit: str
    healthy: str
    equation: str = ""


SHARE = "share"
METRICS: dict[str, Metric] = {
    "reward/mean": Metric("Mean reward of all responses sampled in the step.", "reward", "rises, then levels off"),
    "reward/std": Metric(
        "Standard deviation of the rewards of the step.", "reward", "above 0; at 0 there is nothing to learn"
    ),
    "reward/pass_at_g": Metric(
        "Share of prompts with a response that passes: its reward is data.pass_threshold or more.",
        SHARE,
        "above reward/mean; where both are equal, groups have no spread",
        "mean over prompts of 1[max over the G responses passes]",
    ),
    "response/length_mean": Metric(
        "Mean length of the responses.", "tokens", "level, or moving slowly; not at rollout.max_new_tokens"
    ),
    "response/truncated_frac": Metric(
        "Share of responses that reached rollout.max_new_tokens before an end-of-text.", SHARE, "near 0 and not rising"
    ),
    "response/tokens": Metric("Response tokens of the step, all ranks.", "tokens", "batch size times mean length"),
    "response/empty": Metric("Responses without a token.", "responses", "0"),
    "policy/entropy": Metric(
        "Mean entropy of pi_theta at the response tokens, at the sampling temperature.",
        "nats",
        "falls slowly while the reward rises; a rise with a falling reward is trouble",
        "mean of -sum_v pi_theta(v) log pi_theta(v)",
    ),
    "policy/kl_reference": Metric(
        "Distance of pi_theta from the reference, the policy at the start; with objective.kl_coef only.",
        "nats",
        "grows slowly; kl_coef holds it",
        "mean of x - 1 - log x, x = pi_ref/pi_theta",
    ),
    "mismatch/kl_k1": Metric(
        "The engines' discrepancy, unbiased and signed: noisy, near 0.",
        "nats",
        "within the noise of 0",
        "mean of log mu - log pi_old",
    ),
    "mismatch/kl_k3": Metric(
        "The engines' discrepancy: KL(mu, pi_old) by an estimator that is never negative.",
        "nats",
        "1e-13 to 1e-11 in float32, about 1e-4 in bfloat16, up to 1e-2 in fp8 and int4; level over time",
        "mean of rho - 1 - log rho",
    ),
    "mismatch/abs_logprob_diff_max": Metric(
        "The one token on which the engines differ most.",
        "nats",
        "near its usual level",
        "max of |log pi_old - log mu|",
    ),
    "mismatch/extreme_frac_2": Metric(
        "Share of tokens whose probability differs by more than a factor of 2 between the engines.",
        SHARE,
        "0 in float32 and bfloat16, under 0.01 in int4; rises before k3 does",
        "mean of 1[max(rho, 1/rho) > 2]",
    ),
    "mismatch/is_weight_mean": Metric(
        "Mean importance weight of the engines' discrepancy, truncated at objective.is_cap.",
        "ratio",
        "1, up to the mismatch",
        "mean of min(rho, cap)",
    ),
    "mismatch/is_truncated_frac": Metric(
        "Share of tokens whose weight the cap truncates.", SHARE, "near 0", "mean of 1[rho > cap]"
    ),
    "loss/value": Metric(
        "The surrogate loss. Its weights are constants, so its gradient counts, not its level.",
        "reward",
        "near 0; neither level nor trend says whether the policy learns",
        "-sum of sg[weight x mask] A log pi_theta, over the objective's denominator; mean over the updates; "
        "docs/objective.md",
    ),
    "loss/weight_mean": Metric(
        "Mean weight of a token as the loss applied it.", "ratio", "near 1", "minirl: mean of min(pi_theta/mu, cap)"
    ),
    "loss/weight_truncated_frac": Metric("Share of tokens whose weight in the loss was cut.", SHARE, "near 0"),
    "staleness/kl_k3": Metric(
        "How far the policy moves within a step: KL(pi_old, pi_theta) over the N updates, each before its own step.",
        "nats",
        "0 for N = 1; small and level for N > 1",
        "mean of r - 1 - log r",
    ),
    "staleness/ratio_max": Metric(
        "The largest ratio of a token over the N updates.", "ratio", "1 for N = 1", "max of r"
    ),
    "staleness/clip_frac_pos": Metric(
        "Share of tokens with A > 0 that the clip leaves out.",
        SHARE,
        "a few per cent, level",
        "mean of 1[M = 0, A > 0]",
    ),
    "staleness/clip_frac_neg": Metric(
        "Share of tokens with A < 0 that the clip leaves out.",
        SHARE,
        "a few per cent, level",
        "mean of 1[M = 0, A < 0]",
    ),
    "routing/agree_rollout_old": Metric(
        "How far the rollout's experts are those that the trainer's live scores choose in the pi_old pass.",
        SHARE,
        "1 in float32 up to ties, about 0.995 in bfloat16, above 0.9 in int4",
        "mean over tokens and MoE layers of |mu's experts in common with pi_old's| / k",
    ),
    "routing/agree_old_current": Metric(
        "The same between the pi_old pass and the updates: how far N updates move the routers.",
        SHARE,
        "1 for N = 1, above 0.96 for N = 8",
    ),
    "routing/any_layer_differs_frac": Metric(
        "Share of tokens on which at least one MoE layer chose other experts than the rollout.",
        SHARE,
        "0 in float32 up to ties; grows with the number of layers",
    ),
    "routing/layer_agreement": Metric(
        "routing/agree_rollout_old of each MoE layer, a list in their order.",
        SHARE,
        "no layer alone far below the rest",
    ),
    "routing/worst_gap": Metric(
        "Largest distance in router score between the k-th live expert and a rollout's expert that differs.",
        "score",
        "small: experts differ only where scores are nearly tied",
    ),
    "routing/bytes_ingested": Metric("Bytes of routes that came with the responses.", "bytes", "tokens x layers x k"),
    "routing/bytes_received_per_rank": Metric(
        "Bytes of routes that the rank with the most received.", "bytes", "about bytes_ingested / ranks"
    ),
    "routing/missing_rows": Metric("Rows without routes, which are routed live.", "rows", "0"),
    "optim/grad_norm": Metric(
        "Norm of the policy's gradient before train.clip_grad; the largest of the step's updates.",
        "norm",
        "level, with single spikes; 0 or missing where there was no update",
    ),
    "optim/lr": Metric("Learning rate of the step's last update.", "", "follows train.lr and its schedule"),
    "critic/loss": Metric("The critic's clipped value loss; PPO only.", "reward^2", "falls, then levels off"),
    "critic/value_mean": Metric("Mean value before the updates.", "reward", "follows critic/return_mean"),
    "critic/return_mean": Metric("Mean return, the critic's target.", "reward", "follows the reward"),
    "critic/explained_variance": Metric(
        "Share of the returns' variance that the values explain.",
        SHARE,
        "rises towards 1; below 0 the critic is worse than a constant",
        "1 - mean (R - V)^2 / var R",
    ),
    "critic/clip_frac": Metric(
        "Share of values that critic.value_clip holds.", SHARE, "near 0", "mean of 1[|V - V_old| > clip]"
    ),
    "critic/grad_norm": Metric("Norm of the critic's gradient before clipping.", "norm", "level"),
    "critic/lr": Metric("The critic's learning rate.", "", "follows critic.lr and the schedule"),
    "batch/groups": Metric("Groups that the step trained on.", "groups", "batch.prompts"),
    "batch/equal_groups": Metric(
        "Groups whose rewards are all equal: they teach nothing.",
        "groups",
        "some; as many as batch/groups and there is no update",
    ),
    "batch/refilled_groups": Metric(
        "Groups sampled in place of equal ones.", "groups", "0 unless batch.equal_groups=refill"
    ),
    "batch/bad_samples": Metric(
        "Responses that cannot be used: no finite reward or log-probability.", "responses", "0"
    ),
    "batch/nothing_to_learn": Metric(
        "Mini-batches without an update because nothing in them teaches: all rewards equal, or no token left to train "
        "on (batch.mask_truncated).",
        "mini-batches",
        "0; some near the end. See train.stop_on_dull_steps",
    ),
    "batch/skipped_updates": Metric("Updates left out because something in them was not finite.", "updates", "0"),
    "batch/guarded": Metric(
        "Whether the batch was not trained on because its mismatch left its band (train.mismatch_guard), or, under "
        "train.on_bad_batch skip, because responses are of weights that no sync committed.",
        "0 or 1",
        "0",
    ),
    "sync/bytes": Metric(
        "Bytes of weights sent to the rollout workers.", "bytes", "the model's size, in rollout.dtype"
    ),
    "sync/canary_max_diff": Metric(
        "How far the engines differ on 64 fixed tokens, after the last sync whose canary was compared (docs/async.md).",
        "nats",
        "below 1e-3 in float32 and 0.5 in bfloat16: beyond, the run stops",
        "max of |log pi - log mu|",
    ),
    "sync/canary_median_diff": Metric(
        "The same, the median of the tokens.",
        "nats",
        "steady: beyond 4 times its usual, and 1e-4 in float32 or 1e-3 in bfloat16, the run stops",
        "median of |log pi - log mu|",
    ),
    "sync/canary_tail_diff": Metric(
        "The same, the mean of the largest sixteenth.",
        "nats",
        "steady: in bfloat16 the run stops beyond 4 times its usual and 1e-3",
        "mean of the 3 largest |log pi - log mu|",
    ),
    "fleet/workers": Metric(
        "Rollout workers that hold the weights after the step's sync.", "workers", "rollout.engines"
    ),
    "fleet/lost": Metric(
        "Workers that failed, fell silent or did not answer since the sync before.",
        "workers",
        "0; one that leaves is none",
    ),
    "fleet/joined": Metric(
        "Workers that this sync gave their first weights: new ones, and those that were started again.", "workers", "0"
    ),
    "fleet/asked_again": Metric(
        "Prompts that a worker had at work when it was lost, since the step before; others were given them.",
        "prompts",
        "0",
    ),
    "time/rollout_s": Metric("Sampling, rewards and refills.", "seconds", ""),
    "time/old_logprob_s": Metric("The pi_old pass; 0 where the only update is its own.", "seconds", ""),
    "time/reference_s": Metric("The reference's pass.", "seconds", ""),
    "time/values_s": Metric("The critic's pass.", "seconds", ""),
    "time/update_s": Metric("The N updates, without time/canary_s.", "seconds", ""),
    "time/canary_s": Metric(
        "With rollouts in flight: the wait for the servers' score of the canary before the first optimizer step.",
        "seconds",
        "",
    ),
    "time/sync_s": Metric("Weights to the workers, checks, canary.", "seconds", ""),
    "time/step_s": Metric("The whole step, without evaluation and checkpoint.", "seconds", ""),
    "throughput/tokens_per_s": Metric("Response tokens over time/step_s.", "tokens/s", ""),
    "throughput/train_tokens_per_s": Metric(
        "Response tokens over time/update_s; missing in a step without an update.", "tokens/s", ""
    ),
    "version/weights": Metric("Optimizer steps done at the last weight sync.", "updates", "N more every step"),
    "version/rollout_lag_max": Metric(
        "Optimizer steps by which the oldest token's weights lie behind.", "updates", "0 when synchronous"
    ),
    "async/lag_mean": Metric(
        "Mean lag of the groups of the batch: optimizer steps done, less the version of the oldest token.",
        "updates",
        "at or below rollout.max_lag",
    ),
    "async/lag_max": Metric("The largest of these lags.", "updates", "at most rollout.max_lag"),
    "async/in_flight": Metric("Groups being sampled when the step ends.", "groups", "level, above 0"),
    "async/dropped_groups": Metric(
        "Groups that had become too old; their prompts are sampled again.", "groups", "0, or few after a fault"
    ),
    "async/trainer_idle_frac": Metric(
        "Share of the step in which the trainer waited for rollouts.", SHARE, "near 0; else add rollout servers"
    ),
    "async/rollout_idle_frac": Metric(
        "Share of the step in which a server had nothing to sample, mean over the servers.",
        SHARE,
        "near 0; else raise rollout.max_lag, or take fewer servers",
    ),
    "async/spans_per_response": Metric(
        "Versions of the weights that a response was sampled with, mean over responses.",
        "versions",
        "1 where responses end within a step; grows with their length",
    ),
    "async/mismatch_k3_by_lag": Metric(
        "mismatch/kl_k3 of the tokens of each lag, in batches of updates: 0, 1, ...; 0 where there is none.",
        "nats",
        "grows slowly with the lag: the policy has moved on by so much",
    ),
    "async/in_flight_k3": Metric(
        "mismatch/kl_k3 of tokens without lag in responses that had older weights before; missing without any.",
        "nats",
        "as mismatch/kl_k3 in lock-step under rollout.in_flight recompute; more under keep",
    ),
    "async/staleness_k3_by_lag": Metric(
        "staleness/kl_k3 of the tokens of each lag, in batches of updates; 0 where there is none.",
        "nats",
        "the same at every lag",
    ),
    "eval/mean_at_k": Metric(
        "Mean reward over validation prompts, k responses each.", "reward", "rises with the reward"
    ),
    "eval/pass_at_k": Metric(
        "Share of validation prompts with at least one response that passes.", SHARE, "at or above mean@k"
    ),
    "eval/k": Metric("Responses a validation prompt.", "responses", "eval.samples"),
    "eval/bad_samples": Metric("Responses of the evaluation whose reward failed; they are left out.", "responses", "0"),
}
