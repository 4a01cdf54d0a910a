"""All seeded bugs, by name."""

from collections.abc import Mapping

from tests.parity.dialect_mutations import DIALECT_MUTATIONS
from tests.parity.expert_mutations import EXPERT_MUTATIONS
from tests.parity.mutations import MUTATIONS, Mutation

ALL_MUTATIONS: Mapping[str, Mutation] = {**MUTATIONS, **EXPERT_MUTATIONS, **DIALECT_MUTATIONS}
