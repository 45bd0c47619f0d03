"""What newcomers ask first. Each name is looked up in the corpus: its signature and the first sentence of its
documentation are the answer, so nothing here can disagree with the installed version; a name that is not there
(another Python, another torch) is left out.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from hanlin.quickstart.clean import first_sentence, paragraphs
from hanlin.quickstart.walk import Document

BUILTINS = """
abs all any ascii bin bool callable chr dict dir divmod enumerate eval filter float format frozenset getattr globals
hash help hex id input int isinstance issubclass iter len list locals map max min next object oct open ord pow print
range repr reversed round set setattr slice sorted str sum super tuple type vars zip
str.join str.split str.strip str.replace str.upper str.lower str.startswith str.endswith str.find str.format str.title
list.append list.extend list.insert list.pop list.remove list.reverse list.sort list.index list.count
dict.get dict.items dict.keys dict.values dict.update dict.pop set.add set.union set.intersection
"""
STANDARD_LIBRARY = """
json.dumps json.loads json.dump json.load os.path.join os.path.exists os.path.basename os.path.dirname os.path.abspath
os.path.isfile os.path.isdir os.path.splitext os.listdir os.makedirs os.remove os.rename os.getcwd os.walk os.getenv
math.sqrt math.sin math.cos math.tan math.exp math.log math.log2 math.log10 math.floor math.ceil math.factorial math.gcd
math.pow math.isnan math.hypot math.radians math.degrees
random.random random.randint random.choice random.shuffle random.sample random.uniform random.seed random.gauss
time.time time.sleep time.perf_counter time.strftime datetime.datetime datetime.date datetime.timedelta
datetime.datetime.now collections.Counter collections.defaultdict collections.OrderedDict collections.deque
collections.namedtuple itertools.chain itertools.product itertools.permutations itertools.combinations itertools.count
itertools.repeat itertools.islice itertools.groupby functools.reduce functools.partial functools.lru_cache
functools.wraps re.match re.search re.findall re.sub re.split re.compile copy.copy copy.deepcopy glob.glob
shutil.copy shutil.move shutil.rmtree shutil.copytree pathlib.Path pathlib.Path.exists pathlib.Path.read_text
pathlib.Path.write_text pathlib.Path.mkdir subprocess.run threading.Thread threading.Lock csv.reader csv.writer
csv.DictReader pickle.dumps pickle.loads hashlib.sha256 base64.b64encode base64.b64decode urllib.parse.quote
urllib.parse.urlparse urllib.request.urlopen logging.info logging.getLogger logging.basicConfig
argparse.ArgumentParser statistics.mean statistics.median statistics.stdev heapq.heappush heapq.heappop bisect.bisect
tempfile.mkdtemp uuid.uuid4 asyncio.sleep asyncio.run asyncio.gather contextlib.contextmanager dataclasses.dataclass
dataclasses.field string.capwords textwrap.dedent textwrap.wrap fractions.Fraction decimal.Decimal enum.Enum
queue.Queue inspect.signature zlib.compress gzip.open struct.pack typing.cast operator.itemgetter sqlite3.connect
"""
NUMPY_AND_TORCH = """
numpy.array numpy.zeros numpy.ones numpy.arange numpy.linspace numpy.reshape numpy.dot numpy.matmul numpy.sum numpy.mean
numpy.std numpy.max numpy.argmax numpy.concatenate numpy.stack numpy.where numpy.sort numpy.unique numpy.exp numpy.sqrt
numpy.transpose numpy.linalg.norm numpy.linalg.inv numpy.eye numpy.full numpy.clip numpy.isnan numpy.load numpy.save
torch.tensor torch.zeros torch.ones torch.arange torch.cat torch.stack torch.matmul torch.sum torch.mean torch.max
torch.argmax torch.softmax torch.exp torch.sqrt torch.abs torch.no_grad torch.save torch.load torch.manual_seed
torch.rand torch.randn torch.eye torch.where torch.Tensor.backward torch.Tensor.item torch.Tensor.view
torch.Tensor.reshape torch.Tensor.to torch.nn.Linear torch.nn.Module torch.nn.Conv2d torch.nn.Embedding torch.nn.Dropout
torch.nn.ReLU torch.nn.GELU torch.nn.Softmax torch.nn.LayerNorm torch.nn.RMSNorm torch.nn.BatchNorm2d torch.nn.LSTM
torch.nn.GRU torch.nn.Transformer torch.nn.MultiheadAttention torch.nn.Sequential torch.nn.CrossEntropyLoss
torch.nn.MSELoss torch.nn.MaxPool2d torch.nn.Sigmoid torch.nn.functional.relu torch.nn.functional.softmax
torch.nn.functional.cross_entropy torch.optim.SGD torch.optim.Adam torch.optim.AdamW torch.utils.data.DataLoader
torch.utils.data.Dataset
"""
MODULES = """
json math os random re time datetime collections itertools functools pathlib shutil subprocess threading csv pickle
hashlib base64 logging argparse statistics heapq copy glob tempfile asyncio contextlib dataclasses enum string textwrap
"""
NAMES: tuple[str, ...] = tuple(" ".join([BUILTINS, STANDARD_LIBRARY, NUMPY_AND_TORCH, MODULES]).split())
LONGEST_HEAD = 96  # characters of a signature before it is cut


@dataclass(frozen=True)
class Fact:
    """name: what is asked for; kind: module, class, function or passage; signature: how it is called (the name alone
    where there is nothing to say); sentence: what it does."""

    name: str
    kind: str
    signature: str
    sentence: str


def fact_of(document: Document) -> Fact | None:
    """The fact that a document holds; None where its first sentence is missing or too long to learn by heart."""
    short = document.name.rpartition(".")[2]
    for block in paragraphs(document.body)[:3]:
        sentence = first_sentence(block)
        if not sentence or "->" in sentence or sentence.startswith(f"{short}("):
            continue  # the second of several signatures, or too long
        if sentence[0].isalpha() and not sentence[0].islower() and not sentence.endswith(":"):
            return Fact(document.name, document.kind, short_signature(document.head), sentence)
        return None
    return None


def short_signature(head: str, *, limit: int = LONGEST_HEAD) -> str:
    """A signature on one line, cut after a whole parameter: `json.dumps(obj, *, skipkeys=False, ...)`."""
    head = " ".join(head.split("\n", 1)[0].split())
    head = head.split(" -> ")[0]
    if len(head) <= limit:
        return head
    cut = head[: limit - 5].rfind(", ")
    return f"{head[:cut]}, ...)" if cut > 0 else head.split("(", 1)[0]


def newcomers_facts(documents: Iterable[Document], *, limit: int) -> list[Fact]:
    """At most `limit` facts: of every group of `NAMES` its first ones, in proportion to the group's length."""
    wanted = {name: place for place, name in enumerate(NAMES)}
    found: dict[str, Fact] = {}
    for document in documents:
        if document.name in wanted and document.name not in found:
            fact = fact_of(document)
            if fact is not None:
                found[document.name] = fact
    groups = [
        [found[n] for n in block.split() if n in found]
        for block in (BUILTINS, STANDARD_LIBRARY, NUMPY_AND_TORCH, MODULES)
    ]
    total = sum(map(len, groups))
    share = min(1.0, limit / total) if total else 0.0
    chosen = [fact for group in groups for fact in group[: round(share * len(group))]]
    return sorted(chosen, key=lambda fact: wanted[fact.name])[:limit]
