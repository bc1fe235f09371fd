"""Subject Fine-tune."""

from __future__ import annotations

from torch import Tensor

from ..blip_qformer.finetune.loop import FULL, LOW_RANK, FinetuneSettings
from ..blip_qformer.finetune.lora import RANK
from ..blip_qformer.finetune.validation import VALIDATION_PROMPTS
from .host.finetune import FinetuneOptions, finetune_subject
from .host.graph import ancestors_hash
from .host.lists import takes_lists
from .host.managed import ManagedEncoder
from .types import CATEGORY, Blip2QFormer, BlipSubject, advanced, io, newer_fields

LoraModel = io.Custom("LORA_MODEL")  # the stock Save LoRA Weights takes it

#: Inputs for further images. Hosts share no stock node that joins images: ImageBatch is deprecated since 0.21.0.
MORE_IMAGES = ("image_2", "image_3", "image_4", "image_5")


class SubjectFinetune(io.ComfyNode):
    """Fine-tunes the model and a subject on a few images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and their help."""
        return io.Schema(
            node_id="BLIPDiffusionSubjectFinetune",
            display_name="Subject Fine-tune",
            category=CATEGORY,
            **newer_fields(
                ["dreambooth", "lora training", "train lora", "fine-tuning", "train subject", "personalization"],
                CATEGORY,
            ),
            description="Teaches the model your thing from 3 to 5 pictures, like DreamBooth or LoRA training, so that "
            "it comes out more alike. About a minute on a large card. Use the new model and subject in place of the "
            "old ones. If you cancel, it keeps what it learned so far: press Run again and the graph goes on with "
            "that. If ComfyUI stops in the middle, the next Run goes on learning.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="Connect model of Load BLIP-Diffusion. It stays as it is; a new one comes out."
                ),
                io.Clip.Input("clip", tooltip="Connect clip of the same Load BLIP-Diffusion."),
                io.Vae.Input("vae", tooltip="Connect vae of the same Load BLIP-Diffusion."),
                Blip2QFormer.Input("qformer", tooltip="Connect qformer of the same Load BLIP-Diffusion."),
                io.Image.Input(
                    "image",
                    tooltip="3 to 5 pictures of the one thing, as a batch or a list: from several sides, in different "
                    "places, the thing large. Any sizes; only the middle square of each is learned.",
                ),
                io.String.Input(
                    "subject_word",
                    default="dog",
                    tooltip="What the thing is, in one to three English words: dog, teddy bear, teapot.",
                ),
                io.Int.Input(
                    "steps",
                    default=80,
                    min=1,
                    max=2000,
                    tooltip="How long it learns. The authors needed 40 to 120 steps. Raise it if the thing does not "
                    "come out alike. The best step is kept.",
                ),
                io.Combo.Input(
                    "trains",
                    options=[LOW_RANK, FULL],
                    default=LOW_RANK,
                    tooltip="What is changed. low-rank: a small addition of a few megabytes (a LoRA), for small "
                    "graphics cards. full: the whole network, as the authors do; it needs 14 GB more memory, and its "
                    "file is as large as the network.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=5e-6,
                    min=1e-8,
                    max=1.0,
                    step=1e-7,
                    round=1e-8,
                    tooltip="How fast it learns. This is the authors' value; low-rank learns twenty times as fast by "
                    "itself. Lower it if every picture looks like yours, whatever the prompt says.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**32,
                    control_after_generate=False,
                    tooltip="The number that the random choices begin with. The same seed learns the same.",
                ),
                advanced(
                    io.Int.Input(
                        "batch_size",
                        default=3,
                        min=1,
                        max=64,
                        tooltip="How many pictures it looks at in one step. Lower it if your card runs out of memory.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "resolution",
                        default=512,
                        min=64,
                        max=2048,
                        step=64,
                        tooltip="The size of the square pictures it learns from, in pixels. 512 is right for SD1.5.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "rank",
                        default=RANK,
                        min=1,
                        max=256,
                        tooltip="Only for low-rank: how much room there is to learn. Higher: more details and a "
                        "larger file.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "look_every",
                        default=20,
                        min=0,
                        max=2000,
                        tooltip="It draws test pictures after so many steps and gives them scores, so that the best "
                        "step can be kept. 0: no tests, which is faster; the last step is kept.",
                    )
                ),
                advanced(
                    io.String.Input(
                        "look_prompts",
                        default="\n".join(VALIDATION_PROMPTS),
                        multiline=True,
                        tooltip="What to draw in the tests, one line each, written as in Subject Prompt Compose.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "gradient_checkpointing",
                        default=True,
                        tooltip="Needs less memory and takes a little longer. Switch it off only if your card has "
                        "much memory.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "mirror",
                        default=False,
                        tooltip="Learns from mirrored pictures too. Not for things with writing on them, and not for "
                        "faces.",
                    )
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the thing is, as in BLIP-2 Subject Encode. The background is still learned.",
                ),
                *(
                    io.Image.Input(name, optional=True, tooltip="Another picture of the same thing, of any size.")
                    for name in MORE_IMAGES
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The model that knows your thing. Connect it to KSampler."
                ),
                BlipSubject.Output(
                    display_name="subject",
                    tooltip="Your thing, as it was learned. Connect it to Subject Prompt Compose.",
                ),
                LoraModel.Output(
                    display_name="weights",
                    tooltip="What was learned, to keep it as a file with Save LoRA Weights; Load LoRA loads that "
                    "file. Keep the subject too, with Save Subject.",
                ),
                io.Image.Output(
                    display_name="curve",
                    tooltip="A chart of the learning: the error, the scores, and which step was kept.",
                ),
                io.Image.Output(
                    display_name="previews",
                    tooltip="The test pictures: a row for each prompt, a column for each test, the first one before "
                    "learning.",
                ),
                io.String.Output(
                    display_name="report", tooltip="Text to read: what was learned, and which step was kept."
                ),
            ],
            hidden=[io.Hidden.dynprompt, io.Hidden.unique_id],
            is_input_list=True,
        )

    @classmethod
    @takes_lists("image", "mask", *MORE_IMAGES)
    def execute(
        cls,
        model: io.Model.Type,
        clip: io.Clip.Type,
        vae: io.Vae.Type,
        qformer: ManagedEncoder,
        image: list[Tensor],
        subject_word: str,
        steps: int,
        trains: str,
        learning_rate: float,
        seed: int,
        batch_size: int,
        resolution: int,
        rank: int,
        look_every: int,
        look_prompts: str,
        gradient_checkpointing: bool,
        mirror: bool,
        mask: list[Tensor] | None = None,
        **more_images: list[Tensor],
    ) -> io.NodeOutput:
        """Fine-tune the model and the subject on the images."""
        images = [*image, *(batch for name in MORE_IMAGES for batch in more_images.get(name, []))]
        word = subject_word.strip()
        settings = FinetuneSettings(steps, learning_rate, batch_size, seed=seed)
        options = FinetuneOptions(
            trains, rank, gradient_checkpointing, resolution, mirror, validate_every=look_every, prompts=look_prompts
        )
        graph = ancestors_hash(cls.hidden.dynprompt, cls.hidden.unique_id) if cls.hidden.dynprompt else ""
        return io.NodeOutput(*finetune_subject(model, clip, vae, qformer, images, mask, word, settings, options, graph))


NODES = [SubjectFinetune]
