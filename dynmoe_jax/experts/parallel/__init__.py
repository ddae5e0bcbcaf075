"""Expert parallelism: how tokens travel to the devices that have their experts."""
