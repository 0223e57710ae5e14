"""The papers behind what a plan uses, as BibTeX."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ranksearch.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Paper:
    """One entry; `venue` is a journal where the kind is `article`, else the proceedings."""

    key: str
    kind: str
    title: str
    author: str
    venue: str
    year: int
    eprint: str | None = None

    def bibtex(self) -> str:
        """The entry as BibTeX has it."""
        fields = {
            "title": self.title,
            "author": self.author,
            "journal" if self.kind == "article" else "booktitle": self.venue,
            "year": str(self.year),
        }
        if self.eprint is not None:
            fields |= {"eprint": self.eprint, "archivePrefix": "arXiv"}
        lines = ",\n".join(f"  {name} = {{{text}}}" for name, text in fields.items())
        return f"@{self.kind}{{{self.key},\n{lines}\n}}"


ZHANG = Paper(
    key="zhang2016accelerating", kind="article", year=2016, eprint="1505.06798",
    title="Accelerating Very Deep Convolutional Networks for Classification and Detection",
    author="Zhang, Xiangyu and Zou, Jianhua and He, Kaiming and Sun, Jian",
    venue="IEEE Transactions on Pattern Analysis and Machine Intelligence",
)  # fmt: skip
LIEBENWEIN = Paper(
    key="liebenwein2021compressing", kind="inproceedings", year=2021, eprint="2107.11442",
    title="Compressing Neural Networks: Towards Determining the Optimal Layer-wise Decomposition",
    author="Liebenwein, Lucas and Maalouf, Alaa and Gal, Oren and Feldman, Dan and Rus, Daniela",
    venue="Advances in Neural Information Processing Systems",
)  # fmt: skip
OF_DECOMPOSITION: Mapping[str, tuple[Paper, ...]] = {
    "svd": (ZHANG,),
    "grouped_svd": (LIEBENWEIN,),
    "spatial_svd": (
        Paper(
            key="jaderberg2014speeding", kind="inproceedings", year=2014, eprint="1405.3866",
            title="Speeding up Convolutional Neural Networks with Low Rank Expansions",
            author="Jaderberg, Max and Vedaldi, Andrea and Zisserman, Andrew",
            venue="British Machine Vision Conference",
        ),
    ),
    "tucker2": (
        Paper(
            key="kim2016compression", kind="inproceedings", year=2016, eprint="1511.06530",
            title="Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications",
            author="Kim, Yong-Deok and Park, Eunhyeok and Yoo, Sungjoo and Choi, Taelim and Yang, Lu and Shin, Dongjun",
            venue="International Conference on Learning Representations",
        ),
    ),
    "cp": (
        Paper(
            key="lebedev2015speeding", kind="inproceedings", year=2015, eprint="1412.6553",
            title="Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition",
            author="Lebedev, Vadim and Ganin, Yaroslav and Rakhuba, Maksim and Oseledets, Ivan and Lempitsky, Victor",
            venue="International Conference on Learning Representations",
        ),
        Paper(
            key="phan2020stable", kind="inproceedings", year=2020, eprint="2008.05441",
            title="Stable Low-rank Tensor Decomposition for Compression of Convolutional Neural Network",
            author="Phan, Anh-Huy and others",
            venue="European Conference on Computer Vision",
        ),
    ),
    "tensor_train": (
        Paper(
            key="oseledets2011tensor", kind="article", year=2011,
            title="Tensor-Train Decomposition", author="Oseledets, Ivan V.",
            venue="SIAM Journal on Scientific Computing",
        ),
        Paper(
            key="garipov2016ultimate", kind="article", year=2016, eprint="1611.03214",
            title="Ultimate Tensorization: Compressing Convolutional and FC Layers Alike",
            author="Garipov, Timur and Podoprikhin, Dmitry and Novikov, Alexander and Vetrov, Dmitry",
            venue="arXiv preprint",
        ),
    ),
    "depthwise_separable": (
        Paper(
            key="guo2018network", kind="inproceedings", year=2018, eprint="1808.05517",
            title="Network Decoupling: From Regular to Depthwise Separable Convolutions",
            author="Guo, Jianbo and Li, Yuxi and Lin, Weiyao and Chen, Yurong and Li, Jianguo",
            venue="British Machine Vision Conference",
        ),
    ),
    "blueprint_separable": (
        Paper(
            key="haase2020rethinking", kind="inproceedings", year=2020, eprint="2003.13549",
            title="Rethinking Depthwise Separable Convolutions: "
            "How Intra-Kernel Correlations Lead to Improved MobileNets",
            author="Haase, Daniel and Amthor, Manuel",
            venue="IEEE/CVF Conference on Computer Vision and Pattern Recognition",
        ),
    ),
    "harmonic": (
        Paper(
            key="ulicny2022harmonic", kind="article", year=2022, eprint="2001.06570",
            title="Harmonic Convolutional Networks Based on Discrete Cosine Transform",
            author="Ulicny, Matej and Krylov, Vladimir A. and Dahyot, Rozenn",
            venue="Pattern Recognition",
        ),
    ),
}  # fmt: skip
ROUNDING = Paper(
    key="frantar2022gptq", kind="inproceedings", year=2023, eprint="2210.17323",
    title="{GPTQ}: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    author="Frantar, Elias and Ashkboos, Saleh and Hoefler, Torsten and Alistarh, Dan",
    venue="International Conference on Learning Representations",
)  # fmt: skip
DISTILLATION = Paper(
    key="hinton2015distilling", kind="article", year=2015, eprint="1503.02531",
    title="Distilling the Knowledge in a Neural Network",
    author="Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff",
    venue="arXiv preprint",
)  # fmt: skip
SEARCH = Paper(
    key="akiba2019optuna", kind="inproceedings", year=2019, eprint="1907.10902",
    title="Optuna: A Next-generation Hyperparameter Optimization Framework",
    author="Akiba, Takuya and Sano, Shotaro and Yanase, Toshihiko and Ohta, Takeru and Koyama, Masanori",
    venue="ACM SIGKDD International Conference on Knowledge Discovery and Data Mining",
)  # fmt: skip


def papers_of(plans: Iterable[Plan]) -> list[Paper]:
    """The papers behind the plans' decompositions and bits, each once, and those behind any plan."""
    choices = [choice for plan in plans for choice in plan.changes().values()]
    names = sorted({choice.decomposition for choice in choices})
    found = [paper for name in names for paper in OF_DECOMPOSITION.get(name, ())]
    if any(choice.weight_bits < 16 for choice in choices):
        found.append(ROUNDING)
    return list(dict.fromkeys([*found, DISTILLATION, SEARCH]))


def bibtex(plans: Iterable[Plan]) -> str:
    """These papers as BibTeX."""
    return "\n\n".join(paper.bibtex() for paper in papers_of(plans))
