"""Settings of the scripts; training's are the paper's recipe.

A config of your own imports this one and overrides what differs; see `smollm2.py`.
"""

import ml_collections
from ml_collections.config_dict import placeholder


def get_config() -> ml_collections.ConfigDict:
    """The defaults. A `placeholder` is None until it is set."""
    config = ml_collections.ConfigDict()

    # The base model: a Hugging Face folder, hub id or GGUF file.
    config.model = placeholder(str)
    # float32, bfloat16, float16, int8 (matrices alone); None: float32 on CPU, bfloat16 elsewhere.
    config.dtype = placeholder(str)
    config.mesh = (-1, 1, 1)  # devices along (data, fsdp, model); -1 takes what remains

    # How a question becomes a prompt. The tags are for models without a chat template.
    config.system = placeholder(str)  # None: the template's own; "": none
    config.date_string = placeholder(str)
    # Further variables of the chat template, as JSON: '{"enable_thinking": true}'.
    config.chat_template_kwargs = "{}"
    config.question_start = "Question: "
    config.question_end = "\n"
    config.answer_start = "Answer: "

    # What to forget and what to retain: "tofu:SPLIT", or a file or folder of JSON or JSON-lines;
    # "SOURCE[:400]" is some of its rows, "SOURCE+SOURCE" both.
    config.forget = placeholder(str)
    config.retain = placeholder(str)
    config.tofu_dir = placeholder(str)  # None: TOFU from the Hugging Face hub
    config.request = ""  # name of the request, for the head's card
    config.max_length = placeholder(int)  # tokens; None: the model's context

    # Fine-tuning: makes a model to unlearn from, or its twin that never saw the forget set.
    config.finetune_data = ()  # sources as above: all of their rows are trained on
    config.finetune_validation = ()  # their loss is reported after each epoch
    config.finetune_workdir = placeholder(str)  # checkpoints, metrics and the model
    config.finetune_epochs = 5
    config.finetune_batch_size = 32
    config.finetune_microbatches = 1  # parts of a batch, one after the other: less memory
    config.finetune_learning_rate = 1e-5
    config.finetune_warmup_steps = 20
    config.finetune_weight_decay = 0.01
    config.finetune_remat = False  # less memory, a third more work
    config.finetune_seed = 0
    config.finetune_checkpoint_every = 100  # steps; each of the two kept takes 12 bytes a weight
    # Unlearning by MinNorm-OG (docs/minnorm_og.md): `finetune_data` is then what is retained. The
    # share of the weights' part outside the span of retained gradients that the first projection
    # takes away; 0: plain fine-tuning.
    config.minnorm_share = 0.0
    config.minnorm_decay = 0.9  # of that share, after each projection
    config.minnorm_every = 1  # epochs from one projection to the next
    config.minnorm_last_epochs = 2  # epochs at the end without one
    config.minnorm_n_pert = 50  # gradients of a projection
    # "joint": LoRA-ML (docs/lora_ml.md). Each source of `finetune_data` is a task with an adapter
    # of `lora_rank` of its own beside all weights, which are written without it; None: no tasks.
    config.meta = placeholder(str)
    config.lora_rank = 0  # 0: all weights are trained
    config.lora_alpha = 16.0
    config.lora_layers = ("q", "k", "v", "o", "gate", "up", "down")

    # Features. "mean" is the paper's; "last", the last hidden state, and "mean+last" go beyond it.
    config.features = "mean+last"
    config.feature_store = "out/features"
    config.feature_dtype = "float32"

    # Texts that the base model writes for the training of its head, all beyond the paper.
    config.own_samples = 1000  # chats of its own, a second retain source; 0: none
    config.openings = ()  # questions for these chats; empty: it asks by itself
    config.made_up_names = 4  # made-up people for each forget row; 0: no counterfactuals
    config.names = ()  # names of the request; empty: those that the forget questions ask about
    config.earlier_turns = 0.0  # share of the questions trained behind an earlier turn; 0: none
    config.paraphrases = 0  # of each forget question, by an instruct model; 0: none

    # The head. T and s are stored with it when it is trained, and may be overridden when sampling.
    config.rank = 100
    config.activation = "gelu"  # "identity" in the paper, without bias
    config.num_hidden_layers = 1
    config.bias = True
    config.zero_output = True  # False in the paper
    config.base_temperature = placeholder(float)  # T; None: in training chosen by the made-up-name
    # level, or 2.5 without made-up names; then the head's
    config.guidance_scale = placeholder(float)  # s; None: the same, or 1
    # The forget set's share of forget and retain text in what the model learned: an extension that
    # shifts the scores to this class prior. Stored and overridden as T and s are; None: half in
    # training, as in the paper, then the head's.
    config.forget_fraction = placeholder(float)
    # Extensions when sampling: "plain", or some of "gated" (retain text is not tempered),
    # "protected" (the tilt leaves stop tokens alone) and "product" (of several heads, instead of
    # disjoint requests), joined by "-".
    config.refinements = "plain"

    # Training.
    config.workdir = placeholder(str)  # checkpoints, metrics and the head
    config.seeds = (1,)
    # A head folder whose weights training starts at, such as a meta-learned one
    # (docs/lora_ml.md); None: PyTorch's start.
    config.init = placeholder(str)
    # "distillation" trains the served distribution to be the base model's under made-up names;
    # "classifier" is the paper's loss. configs/paper.py is the whole published recipe.
    config.loss = "distillation"
    config.distilled_temperature = 1.0  # T that a distilled head is trained for
    config.overcorrection = 1.25  # how far its targets are moved away from the base model
    config.retain_weight = 6.0  # of a position to retain in its loss; to forget: 1
    config.epochs = 40
    config.warmup_ratio = 0.1  # share of the steps in which the learning rate rises
    config.batch_size = 32
    config.learning_rate = 3e-3
    config.weight_decay = 0.01
    config.holdout_fraction = 0.05  # kept from training and evaluated; the paper keeps none
    # Evaluations on the held-out rows without a smaller loss after which training ends, at the best
    # of them; 0: train to the end.
    config.patience = 0

    # Sampling.
    # A head folder, or several with commas between, a head for each of several forget requests;
    # None: nothing is unlearned.
    config.head = placeholder(str)
    config.base_only = False  # sample.py answers without a head, with the base model alone
    config.prompt = placeholder(str)
    config.prompts = placeholder(str)  # a file; without prompts they are typed
    config.output = placeholder(str)  # a JSON-lines file; None: the terminal
    config.rows = 16  # answers decoded together
    config.max_new_tokens = 200
    config.temperature = 0.0  # 0: greedy
    config.top_k = 0
    config.top_p = 1.0
    config.min_p = 0.0
    # What decides top-k, top-p and min-p: "guided", the guided distribution without its tempering;
    # "tilted", with it; or "base", whose nucleus is the text to forget where the base is sure.
    config.truncate_on = "guided"
    config.repetition_penalty = 1.0
    config.num_samples = 1
    config.seed = 0
    config.stop = ()
    config.stop_ids = ()
    # Text in the place of answers that the head has clearly changed, such as "I don't know about
    # this person."; None: the alternative answer. verify.py measures its false alarms. It needs
    # T = 1.
    config.refusal = placeholder(str)
    config.logprobs = False

    # Evaluation: question sets, as for forget and retain above; what is None is left out.
    config.eval_forget = placeholder(str)
    config.eval_retain = placeholder(str)
    config.eval_real_authors = placeholder(str)
    config.eval_world_facts = placeholder(str)
    config.eval_holdout = placeholder(str)  # rows never trained on, for membership inference
    config.eval_rows = placeholder(int)  # of each set at most, evenly spread; None: all
    # Settings: the base model, every head at every (T, s), and controls.
    # Each as `head` above, such as ("a", "b", "a,b"); empty: that.
    config.eval_heads = ()
    config.eval_temperatures = ()  # T; empty: each head's own
    config.eval_scales = ()  # s; empty: each head's own
    config.eval_refinements = placeholder(str)  # with commas between; None: `refinements` above
    config.eval_controls = True  # (T, s = 0) and (T = 1, s' = T s) of every setting
    # The sweep: a grid of heads, and the choice among them; an empty list is the value above.
    config.sweep_learning_rates = ()
    config.sweep_weight_decays = ()
    config.sweep_ranks = ()
    # Or "quality_given_utility": smallest D at 97 % of the base's utility; or "smallest_distance".
    config.selection_rule = "utility_given_quality"
    config.selection_group = 20  # rows on one author stay in one half; TOFU has 20 to an author
    # The TOFU_EVAL.json of another retain model, evaluated beside `retain_model`: the noise floor.
    config.second_retain_log = placeholder(str)
    # The experiment: what is varied beside T and s, each from the chosen setting.
    config.experiment_dir = placeholder(str)
    config.vary_ranks = ()
    config.vary_epochs = ()
    config.vary_retain_rows = ()  # of the first rows of `retain`, how many the head sees
    config.refine_rows = placeholder(int)  # questions of a set answered by each refinement
    config.varied_retain = placeholder(str)  # retain texts of other kinds, as one more refinement
    config.refine_top_p = 0.9  # the base's nucleus, from which answers are drawn once more
    config.plain_chat = placeholder(
        str
    )  # question-answer rows that have nothing to do with any of it
    config.eval_dir = placeholder(str)  # results, and what a stopped run has finished
    config.retain_model = placeholder(str)  # trained without the forget set; KL, its own log
    config.retain_log = placeholder(str)  # its TOFU_EVAL.json; None: that of retain_model
    config.reference_mask = False  # the reference evaluator's attention mask, eos never attended
    config.leak_samples = 4  # answers drawn to each forget question, and to it reworded
    config.leak_rows = placeholder(int)  # to how many of them; None: all
    config.leak_temperature = 1.0
    config.leak_top_k = 0
    config.leak_top_p = 1.0
    config.leak_truncate_on = "guided"
    config.leak_threshold = 0.7  # ROUGE-L recall
    config.kl_rows = 0  # questions of forget and of retain, each, for the Monte-Carlo KL
    config.kl_samples = 1  # answers drawn to each

    # The verdict: forget and retain rows, as above, are asked and the answers judged.
    # The page, and what a stopped run has finished; it holds forget rows. None: HEAD/verify.
    config.verify_dir = placeholder(str)
    config.verify_rows = 60  # of each of the two at most, evenly spread
    config.verify_retained = 0.97  # share of retain rows as before, for exit status 0

    # The server. T, s, truncate_on and refinements above are its policy; the fields of features,
    # head and training above make the heads of requests to forget. Keys are environment variables:
    # T3JAX_API_KEY is what every client has to send, T3JAX_SERVER_KEY allows to add and revoke
    # requests.
    config.serve = ml_collections.ConfigDict()
    config.serve.host = "127.0.0.1"
    config.serve.port = 8000
    config.serve.model_name = placeholder(str)  # what clients call the model; None: `model` above
    config.serve.requests = placeholder(str)  # folder of the requests to forget; None: none taken
    config.serve.timeout = 300.0  # seconds after which an answer is given up
    config.serve.queue = 256  # requests that may wait
    config.serve.rows = 16  # answers decoded together
    config.serve.chunk = 8  # steps between two looks of the host
    config.serve.piece = 128  # tokens of a prompt that are read at a time
    config.serve.max_length = placeholder(int)  # prompt and answer; None: the context, to 2,048
    config.serve.heads = 8  # places for heads
    config.serve.rank = placeholder(int)  # largest rank of a head; None: of `rank` and `head` above
    config.serve.most_leaks = 0.1  # share of a request's rows that may leak for it to be turned on
    config.serve.least_retained = 0.97  # of held-out retain answers' probability, for the same
    config.serve.warm_up = True  # compile before the first request
    return config
