"""A study of mine: a world with goals, a tuner, two recipes, one exhibit. promptnb loads it as a plug-in."""

from . import study as study
from . import tuner as tuner
from . import world as world
