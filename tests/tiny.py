"""Parameters for tests of the whole chain."""

# A chain of seconds: a model that fits a test, not one that learns much.
TINY = {
    "model.image_size": 32,
    "model.embed_dim": 16,
    "model.depths": [1, 1],
    "model.num_heads": [2, 4],
    "model.window_size": 4,
    "pretrain.mask_patch_size": 8,
    "pretrain.epochs": 2,
    "pretrain.warmup_epochs": 1,
    "pretrain.batch_size": 12,
    "finetune.scene.epochs": 2,
    "finetune.scene.warmup_epochs": 1,
    "finetune.scene.batch_size": 12,
    "run.retry_delay_s": 0,
}
