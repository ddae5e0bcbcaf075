"""Mesh of devices: its axes, the sharding of arrays, programs per device, collectives."""
