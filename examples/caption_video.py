"""Caption a video with a draft, and print the statistics of the call.

python examples/caption_video.py                       # the built-in models on a clip they have not seen
python examples/caption_video.py --video my.mp4        # the built-in models on your file
python examples/caption_video.py --video my.mp4 --target Qwen/Qwen2.5-VL-7B-Instruct --draft path/of/a/draft
"""

import argparse
import tempfile
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

from sparrow_hf import SparrowDraftModel, testbed
from sparrow_hf.video import prepare_inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", help="the video to caption")
    parser.add_argument("--target", help="your video LLM: folder or Hub id")
    parser.add_argument("--draft", help="the draft trained for it")
    options = parser.parse_args()

    if options.target:
        target = AutoModelForImageTextToText.from_pretrained(options.target, dtype="auto", device_map="auto")
        processor = AutoProcessor.from_pretrained(options.target)
        draft = SparrowDraftModel.from_pretrained(options.draft)
        fps, max_frames = 2.0, 128  # the frames that the draft was trained with
    else:
        target, processor, draft = testbed.load()
        fps, max_frames = 8.0, 768

    with tempfile.TemporaryDirectory() as folder:
        if options.video:
            question = {"type": "text", "text": "Describe this video in detail."}
            messages = [{"role": "user", "content": [{"type": "video", "video": options.video}, question]}]
        else:
            messages = testbed.make_clip(Path(folder) / "clip.mp4", testbed.EVALUATION_SEEDS[0]).messages
        inputs = prepare_inputs(processor, messages, fps=fps, max_frames=max_frames, target=target)

    output = target.generate(**inputs, assistant_model=draft, max_new_tokens=512)
    print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    stats = draft.last_generation
    print(f"{stats.new_tokens} tokens in {stats.rounds} rounds: τ = {stats.tau:.2f}, k = {stats.k:.2f}")


if __name__ == "__main__":
    main()
