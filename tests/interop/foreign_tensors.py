"""Our parameters under foreign names, for tests that make a foreign model."""

import numpy as np


def to_tensors(found, parameters):
    """Parameters, or anything of their structure such as gradients, as foreign tensors."""
    return {
        name: place.layout.to_foreign(np.asarray(parameters[place.path])[place.index])
        for name, place in found.items()
    }
