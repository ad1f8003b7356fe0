"""Token shards as sequences: laid flat, in their order, mixed, and loaded ahead."""
