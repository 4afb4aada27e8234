"""The same layers under other pipeline engines, on the same link: step time and peak memory."""
