"""What pays: redundant slots, a policy, an LP or not, and from what batch size on, by a model of a layer's time."""

from lplb.advise.choices import generated, loads_by_name, recorded, study
from lplb.advise.worth import Advice, Option, Study

__all__ = ["Advice", "Option", "Study", "generated", "loads_by_name", "recorded", "study"]
