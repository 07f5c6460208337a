"""Which layers go where and what it will cost: pure, without torch."""
