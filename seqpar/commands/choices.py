"""What the commands let one choose from, without importing torch; tests hold each list against the library's own."""

LAYOUTS = ("contiguous", "zigzag", "striped")
TRANSPORTS = ("ring", "all_gather", "all_to_all")
SCANS = ("all_gather", "all_scan", "ring", "doubling")
MIXERS = ("linear_attention", "lightning_attention", "retention", "gla")
