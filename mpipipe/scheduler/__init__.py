"""What runs next: a pure core and an asyncio shell (head rank only)."""
