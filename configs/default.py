"""Every key of a run, with its unit. The other configs change a few.

    python experiments/main.py --config=configs/ml1m.py \\
        --config.optimizer.learning_rate=1e-3 --workdir=runs/a --train --test
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """Mult-VAE of Liang et al. 2018 with the authors' optimiser settings."""
    config = ml_collections.ConfigDict()
    # Seed of the initialisation, the order, the dropout and the noise.
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    # Directory written by prepare_dataset.py (or the paper's pro_sg, or the
    # recipe's preprocessed directory).
    config.data.dir = "data/synthetic"
    # 'resident' on the device, 'streamed' from disk, or 'auto'.
    config.data.feed = "auto"

    config.model = ml_collections.ConfigDict()
    config.model.name = "mult_vae"  # or 'mult_dae', 'rec_vae'
    # Hidden layers from the items inwards; the decoder mirrors them.
    config.model.hidden = (600,)
    config.model.latent = 200  # units of the bottleneck
    config.model.activation = "tanh"  # or 'relu'; rec_vae's is swish
    # Share of a user's items dropped from the input while training.
    config.model.dropout_rate = 0.5
    # Input layer: 'gather' or 'dense' (same numbers), 'auto' by device.
    config.model.input = "auto"
    # Items a block of the likelihood, to bound memory at batch_size x block
    # on large catalogues; 0: all at once.
    config.model.item_block = 0
    # First output weights: 'random', or 'spectral', from the interactions'
    # singular vectors: fewer epochs (vaecf.training.spectral).
    config.model.init = "random"

    # A linear item-item path that ranks beside the model (vaecf.models.blend).
    config.linear = ml_collections.ConfigDict()
    # Its λ, in squared interactions; 0: there is none. Begin with 150.
    config.linear.l2 = 0.0
    # Share of the input it learns to do without (Steck 2020).
    config.linear.dropout = 0.5
    # A user of n items weighs n to the minus this in its fit; 0: all alike.
    config.linear.user_exponent = 0.5
    # Rank of the factors it is kept as; 0: none, it is a matrix items x items;
    # None: a matrix for up to 25,000 items, and a rank of 512 beyond.
    config.linear.rank = config_dict.placeholder(int)

    config.loss = ml_collections.ConfigDict()
    # Weight of the KL term: min(anneal_cap, step / total_anneal_steps).
    config.loss.anneal_cap = 0.2
    config.loss.total_anneal_steps = 200_000  # steps; 0: the cap at once
    # Instead of that, where above 0: the weight is this times the user's
    # interactions.
    config.loss.gamma = 0.0
    # Times the sum of squared weights, added to the loss; biases left out.
    config.loss.weight_decay = 0.0

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 1e-3
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.999
    config.optimizer.epsilon = 1e-8

    config.train = ml_collections.ConfigDict()
    config.train.epochs = 200  # passes over the users
    # rec_vae: epochs of the encoder and of the decoder, in turns, e.g. (3, 1).
    config.train.alternate = ()
    # Rank with an average of the epochs' parameters; it forgets by this factor
    # an epoch, e.g. 0.95. 0: with the parameters as they are.
    config.train.ema = 0.0
    config.train.batch_size = 500  # users, over all devices
    # Users whose activations a device holds at once; a larger batch is gone
    # through in pieces and the gradients are summed: less memory, the same
    # numbers to rounding. 0: 1024 on a CPU, all at once on an accelerator.
    config.train.microbatch = 0
    # Leave out the users that do not fill the last batch.
    config.train.drop_remainder = False
    # First epochs left out of the mean throughput.
    config.train.warm_up_epochs = 1

    config.eval = ml_collections.ConfigDict()
    config.eval.every_epochs = 1  # epochs between validations
    config.eval.batch_size = 2000  # users, over all devices
    # ndcg recall precision hit_rate mrr map coverage popularity, each @k.
    config.eval.metrics = ("ndcg@100", "recall@20", "recall@50")
    # The checkpoint in checkpoints/best is the best by this metric.
    config.eval.best_metric = "ndcg@100"
    # Validations without gain before training stops; None never stops.
    config.eval.patience = config_dict.placeholder(int)

    config.precision = ml_collections.ConfigDict()
    # 'fp32', 'tf32', 'bf16', 'fp16', or 'amp' (bf16 where there is one).
    config.precision.policy = "fp32"
    # Dynamic loss scale of fp16.
    config.precision.initial_loss_scale = 2.0**15
    config.precision.loss_scale_growth_interval = 2000  # finite steps
    config.precision.max_skipped_in_a_row = 50  # steps, then give up

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1  # devices along the users; -1: the rest
    config.mesh.item = 1  # devices along the items
    # Optimiser moments divided over the users' devices too: less memory.
    config.mesh.zero = False
    # Gradients are summed over devices in 'fp32', or in the 'compute' dtype
    # of the precision: half of the traffic in bf16.
    config.mesh.reduce = "fp32"
    # Seconds without progress after which a run of several processes is given
    # up as stuck; 0: never. Compilation and a validation must fit in.
    config.mesh.peer_timeout = 300.0
    return config
