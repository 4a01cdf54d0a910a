"""The operations of a mixture of experts in torch.

B batch, S sequence, D hidden, E experts (of this rank, where they are spread), X experts of a token, F inner width of
an expert, T = B · S tokens, N = T · X rows, one for each token and each of its experts.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from archwright.compiler.distributed.collectives import reduce_from, sum_over
from archwright.compiler.distributed.experts import through_experts
from archwright.compiler.interpreters.grouped_linear import grouped_linear
from archwright.compiler.interpreters.sorting import permute, repeat_sorted, sort_by_expert
from archwright.compiler.ir import Boundary, Penalties, Routing

Tensor = torch.Tensor


class TorchMoe:
    """A part of `TorchOps`."""

    groups: Mapping[str, ProcessGroup]

    def reduce(self, y: Tensor, boundary: Boundary) -> Tensor:
        raise NotImplementedError

    def top_k(self, x_BSE: Tensor, number: int) -> Tensor:
        return x_BSE.topk(number, dim=-1).indices

    def routing_weights(self, logits_BSE: Tensor, indices_BSX: Tensor, routing: Routing) -> Tensor:
        chosen_BSX = _scores(logits_BSE, routing).gather(-1, indices_BSX)
        if routing.normalize:
            chosen_BSX = chosen_BSX / chosen_BSX.sum(dim=-1, keepdim=True)
        return (routing.scale * chosen_BSX).to(logits_BSE.dtype)

    def experts(
        self,
        x_BSD: Tensor,
        weights_BSX: Tensor,
        indices_BSX: Tensor,
        gate_EFD: Tensor,
        up_EFD: Tensor,
        down_EDF: Tensor,
        *,
        dispatch: str | None,
        reduce: Boundary | None,
    ) -> Tensor:
        assert reduce is None or reduce.axes == ("tensor",), "experts of ranks with the same tokens are for graphs"
        gate_EFD, up_EFD, down_EDF = (each.to(x_BSD.dtype) for each in (gate_EFD, up_EFD, down_EDF))

        def swiglu(x_ND: Tensor, ends_E: Tensor) -> Tensor:
            hidden_NF = F.silu(grouped_linear(x_ND, gate_EFD, ends_E)) * grouped_linear(x_ND, up_EFD, ends_E)
            return grouped_linear(hidden_NF, down_EDF, ends_E)

        group = None if dispatch is None else self.groups[dispatch]
        num_experts = gate_EFD.shape[0] * (1 if group is None else group.size())
        by_expert = sort_by_expert(indices_BSX.flatten(), num_experts)
        x_ND = repeat_sorted(x_BSD.flatten(0, 1), by_expert, indices_BSX.shape[-1])
        if group is None:
            y_ND = swiglu(x_ND, by_expert.ends_E)
        else:
            y_ND = through_experts(x_ND, by_expert.ends_E, group, swiglu)
        y_BSXD = permute(y_ND, by_expert.inverse_N, by_expert.order_N).unflatten(0, indices_BSX.shape)
        y_BSD = (y_BSXD * weights_BSX[..., None]).sum(dim=2)
        return y_BSD if reduce is None else self.reduce(y_BSD, reduce)

    def router_penalty(
        self, logits_BSE: Tensor, indices_BSX: Tensor, routing: Routing, penalties: Penalties, *, spread: str | None
    ) -> Tensor:
        experts = logits_BSE.shape[-1]
        score_BSE = _scores(logits_BSE, routing)
        share_BSE = score_BSE / score_BSE.sum(dim=-1, keepdim=True)
        choice_BSE = torch.zeros_like(share_BSE).scatter(-1, indices_BSX, 1 / indices_BSX.shape[-1])
        squares_BS1 = logits_BSE.to(score_BSE.dtype).logsumexp(dim=-1, keepdim=True).square()
        means = self.sequence_mean(torch.cat([choice_BSE, share_BSE, squares_BS1], dim=-1), spread)
        choice_BE, share_BE, squares_B1 = means.split([experts, experts, 1], dim=-1)
        balance_B = experts * (choice_BE * share_BE).sum(dim=-1)
        return penalties.balance * balance_B + penalties.z * squares_B1.squeeze(-1)

    def sequence_mean(self, x_BSE: Tensor, spread: str | None) -> Tensor:
        """The mean [B, E] over all tokens of each sequence, of which a rank has an equal piece.

        spread: the axis over which sequence parallelism spreads the tokens. Every rank of it computes the whole loss
        from this mean, so the gradient of the mean is that of each rank's piece. Ranks of `context` each compute a part
        of the loss, of their own targets, so the gradients that the parts give the mean are summed.
        """
        mean_BE = x_BSE.mean(dim=1)
        if spread is not None:
            mean_BE = reduce_from(mean_BE, self.groups[spread]) / self.groups[spread].size()
        if "context" in self.groups:
            mean_BE = sum_over(mean_BE, self.groups["context"]) / self.groups["context"].size()
        return mean_BE

    def sum_over_targets(self, penalty_B: Tensor, targets_BS: Tensor) -> Tensor:
        return (penalty_B * (targets_BS != -100).sum(dim=-1)).sum()


def _scores(logits_BSE: Tensor, routing: Routing) -> Tensor:
    """At least float32."""
    wide_BSE = logits_BSE.to(torch.promote_types(logits_BSE.dtype, torch.float32))
    return wide_BSE.sigmoid() if routing.score == "sigmoid" else wide_BSE.softmax(dim=-1)
