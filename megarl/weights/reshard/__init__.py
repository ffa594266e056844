"""From training shards to rollout shards: the plan, buckets, packing, quantising, checksums."""
