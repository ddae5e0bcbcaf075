"""Several processes, on one machine or many, that train one run together.

1. A process is told its *rank* (:mod:`.rank`) and *joins* the others (:mod:`.joining`): JAX finds
   the cluster, or flags say where it is.
2. What only one process can know, or do, process 0 does, and the others hear of it
   (:mod:`.agreement`).
3. A process that dies, or stops for an error of its own, stops the others with a sentence
   (:mod:`.watch`).

A process by itself passes through all of this at no cost.
"""
